"""`care heal` as a whole: what it trains, what it leaves, and what it says where it cannot."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import care_mla
from care_mla.config import HealSettings
from care_mla.errors import ConversionError, HealingError
from care_mla.healing import loop
from care_mla.pipeline import convert_and_heal, healing

IDS = torch.randint(3, 259, (2, 24), generator=torch.Generator().manual_seed(5))
STEPS, BATCH_SIZE, SEQLEN = 6, 4, 32
Converted = Callable[[str], Path]
Heal = Callable[..., dict[str, Any]]


@pytest.fixture
def settings(text_file: Path) -> dict[str, Any]:
    """Six steps, evaluated after every second."""
    return {
        "data": str(text_file), "tokens": STEPS * BATCH_SIZE * SEQLEN, "batch_size": BATCH_SIZE, "seqlen": SEQLEN,
        "lr": 5e-4, "eval_blocks": 2, "eval_every": 2, "precision": "float32", "device": "cpu",
    }  # fmt: skip


@pytest.fixture
def heal(converted: Converted, settings: dict[str, Any], tmp_path: Path) -> Heal:
    """heal("joint", kl_weight=2) -> record; the model is in tmp_path / "out"."""

    def run(kind: str = "joint", out: str = "out", **changes: Any) -> dict[str, Any]:
        return care_mla.heal(converted(kind), tmp_path / out, **{**settings, **changes})

    return run


def _weights(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") if "spectra" not in path.name
            for name, tensor in load_file(path).items()}  # fmt: skip


def _steps(directory: Path) -> list[dict[str, float]]:
    """Metrics, all but how long things took."""
    lines = [json.loads(line) for line in (directory / "care_heal.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


def _words(settings: dict[str, Any]) -> list[str]:
    """Settings as options of the command."""
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", ["kv", "attention", "all"])
@pytest.mark.parametrize("kind", ["joint", "split", "mla", "stock"])
def test_healing_comes_closer_to_the_teacher(
    kind: str, trained: str, heal: Heal, converted: Converted, tmp_path: Path
) -> None:
    record = heal(kind, train=trained)
    assert record["healed"]["kl"] < 0.97 * record["one_shot"]["kl"]
    assert record["teacher"]["shares_weights"] == (kind != "stock" and trained != "all")
    before, after = _weights(converted(kind)), _weights(tmp_path / "out")
    assert {(n, t.shape, t.dtype) for n, t in before.items()} == {(n, t.shape, t.dtype) for n, t in after.items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == record["trained"]["tensors"]
    assert trained == "all" or all("self_attn" in name for name in changed)
    assert not any("kv_a_layernorm" in name for name in changed)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["joint", "mla", "stock"])
def test_what_is_written_is_what_was_trained(
    kind: str, heal: Heal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Identity norms folded in again, pairs taken apart: a fresh load has the trained pupil's logits."""
    trained = {}

    def write(opened: Any, out: Any, work: Any, pupil: Any, *rest: Any, **options: Any) -> None:
        trained["logits"] = pupil.model(IDS, use_cache=False).logits.detach()
        _write(opened, out, work, pupil, *rest, **options)

    _write = healing._write
    monkeypatch.setattr(healing, "_write", write)
    heal(kind, train="attention", lr=3e-3, patience=0)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded).__name__ == ("DeepseekV3ForCausalLM" if kind == "stock" else "CareMlaForCausalLM")
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, trained["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_tied_and_untied(
    tied: bool, settings: dict[str, Any], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    source, one_shot, out = tiny(num_hidden_layers=2, tie_word_embeddings=tied), tmp_path / "one", tmp_path / "out"
    care_mla.convert(source, one_shot, calibration={"samples": 4, "seqlen": 16}, rank=8, method="svd", ranks="uniform")
    record = care_mla.heal(one_shot, out, **{**settings, "train": "all"})
    assert record["healed"]["kl"] < 0.97 * record["one_shot"]["kl"]
    before, after = _weights(one_shot), _weights(out)
    assert before.keys() == after.keys() and not any(torch.equal(before[name], after[name]) for name in before)
    model = care_mla.load(out)
    assert torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight) == tied


def test_healing_again_and_the_records(heal: Heal, converted: Converted, settings: dict[str, Any], tmp_path: Path) -> None:
    first = heal(tokens=STEPS * BATCH_SIZE * SEQLEN + 5)
    assert first["step"] == STEPS and first["tokens"] == STEPS * BATCH_SIZE * SEQLEN
    assert [e["step"] for e in first["evaluations"]] == [0, 2, 4, 6]
    second = care_mla.heal(tmp_path / "out", tmp_path / "again", **settings)
    assert second["one_shot"]["kl"] == pytest.approx(first["healed"]["kl"], rel=1e-4)
    manifest = json.loads((tmp_path / "again" / "care_manifest.json").read_text())
    assert manifest["healing"] == [json.loads(json.dumps(record)) for record in (first, second)]
    assert json.loads((tmp_path / "again" / "care_heal.json").read_text()) == manifest["healing"][1]
    assert [line.get("evaluation", line)["step"] for line in _steps(tmp_path / "out")] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]
    for name in ("tokenizer.json", "config.json", "care_spectra.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (converted("joint") / name).read_bytes()


def test_the_best_weights_are_kept(heal: Heal, converted: Converted, tmp_path: Path) -> None:
    """A rate that makes it worse: stopped when the gap no longer closes, and the weights are the first ones."""
    record = heal(lr=0.3, patience=2, eval_every=1)
    assert record["stopped_early"] and record["step"] == 2 and record["best_step"] == 0
    before, after = _weights(converted("joint")), _weights(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)


# --- settings that must not change the result --------------------------------------------------------------------------


def _assert_same_run(first: dict[str, Any], second: dict[str, Any], rel: float = 1e-4) -> None:
    for a, b in zip(first["evaluations"], second["evaluations"], strict=True):
        assert a == pytest.approx(b, rel=rel, abs=1e-6)


@pytest.mark.parametrize(
    "changes", [{}, {"train": "all"}, {"layerwise": "attention", "layerwise_tokens": 256},
                {"layerwise": "hidden", "layerwise_tokens": 256, "train": "all"}]
)  # fmt: skip
def test_gradient_checkpointing_and_micro_batches_change_nothing(changes: dict[str, Any], heal: Heal) -> None:
    plain = heal(**changes)
    _assert_same_run(plain, heal(out="checkpointed", gradient_checkpointing=True, **changes))
    _assert_same_run(plain, heal(out="micro", micro_batch_size=3, **changes))


@pytest.mark.parametrize(("kind", "trained"), [("joint", "kv"), ("mla", "attention"), ("stock", "kv")])
def test_stored_probabilities_stand_for_the_teacher(
    kind: str, trained: str, heal: Heal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them: the same run. A few: another loss, from a file that a second run reads."""
    _assert_same_run(heal(kind, train=trained), heal(kind, "stored", train=trained, teacher_top_k=300))
    few = {"train": trained, "teacher_top_k": 8, "teacher_logits": tmp_path / "logits", "temperature": 2.0}
    first = heal(kind, "few", **few)
    assert first["healed"]["kl"] < first["one_shot"]["kl"]
    (file,) = (tmp_path / "logits").iterdir()
    assert load_file(file)["ids"].shape[-1] == 8
    monkeypatch.setattr("care_mla.healing.store", None)  # nothing is stored again
    assert heal(kind, "again", **few)["evaluations"] == first["evaluations"]
    file.write_bytes(b"damaged")
    with pytest.raises(HealingError, match="damaged"):
        heal(kind, "damaged", **few)


@pytest.mark.parametrize(
    ("kind", "layerwise", "trained"),
    [
        ("joint", "attention", "kv"),
        ("mla", "attention", "attention"),
        ("split", "hidden", "kv"),
        ("joint", "hidden", "all"),
        ("stock", "hidden", "all"),
    ],
)
def test_layers_are_matched_first(kind: str, layerwise: str, trained: str, heal: Heal, tmp_path: Path) -> None:
    tokens = 4 * BATCH_SIZE * SEQLEN
    record = heal(kind, train=trained, layerwise=layerwise, layerwise_tokens=tokens)
    steps = [line for line in _steps(tmp_path / "out") if "loss" in line]
    assert [step["matching"] for step in steps] == [True] * 4 + [False] * 2
    assert steps[3]["loss"] < 0.97 * steps[0]["loss"]
    assert record["healed"]["kl"] < record["one_shot"]["kl"]


def test_text_from_the_teacher_itself(heal: Heal) -> None:
    record = heal(data="self", tokens=2 * BATCH_SIZE * SEQLEN)
    assert record["text"] == {"tokens": 2 * BATCH_SIZE * SEQLEN, "held_out_tokens": 2 * SEQLEN}
    assert record["healed"]["kl"] < record["one_shot"]["kl"]


def test_bfloat16_products(heal: Heal, converted: Converted, tmp_path: Path) -> None:
    record = heal(precision="bfloat16")
    assert record["healed"]["kl"] < 0.97 * record["one_shot"]["kl"]
    assert all(t.dtype == torch.float32 for t in _weights(tmp_path / "out").values())


def test_conversion_heals_as_its_last_stage(care: Callable[..., str], converted: Converted, tmp_path: Path, text_file: Path) -> None:
    recipe = {"rank": 8, "method": "svd", "ranks": "uniform"}
    text = {"calibration": str(text_file), "samples": 4, "seqlen": 32}
    manifest = convert_and_heal(converted("source"), tmp_path / "out", heal_tokens=2048, calibration=text, **recipe)
    (record,) = manifest["healing"]
    assert record["settings"]["data"] == str(text_file)
    assert json.loads((tmp_path / "out" / "care_manifest.json").read_text())["healing"] == [record]
    words = ["--calibration", text_file, "--samples", 4, "--heal-tokens", "2k", "--heal-data", "copy"]
    assert "held-out text" in care("convert", converted("source"), "--out", tmp_path / "two", *_words(recipe), *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "two"]
