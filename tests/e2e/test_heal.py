"""`care heal` as a whole: what it trains, what it leaves, and what it says where it cannot."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import write_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

import care_mla
from care_mla.checkpoint.outputs import Kind, mark
from care_mla.errors import ConfigError, ConversionError, HealingError
from care_mla.healing import loop, state, training
from care_mla.pipeline import convert_and_heal

pytestmark = pytest.mark.usefixtures("no_figures")

IDS = torch.randint(3, 259, (2, 24), generator=torch.Generator().manual_seed(5))
STEPS, BATCH_SIZE, SEQLEN = 6, 4, 32
SETTINGS: dict[str, Any] = {
    "tokens": STEPS * BATCH_SIZE * SEQLEN, "batch_size": BATCH_SIZE, "seqlen": SEQLEN, "lr": 5e-3, "eval_blocks": 2,
    "eval_every": 2, "precision": "float32", "device": "cpu",
}  # fmt: skip
"""Six steps, evaluated after every second."""
CONVERT_AND_HEAL = import_module("care_mla.pipeline.convert_and_heal")
"""Its name in `pipeline` is that of the function."""
TIMEOUT = 300
"""Seconds for processes of their own, which a busy machine may starve."""
Converted = Callable[[str], Path]
Heal = Callable[..., dict[str, Any]]


@pytest.fixture
def settings(text_file: Path) -> dict[str, Any]:
    return {**SETTINGS, "data": str(text_file)}


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


def _kl_left(record: dict[str, Any]) -> float:
    """Of the held-out KL to the teacher, after the last step; which state is kept is another matter."""
    return float(record["evaluations"][-1]["kl"] / record["evaluations"][0]["kl"])


def _losses(directory: Path) -> list[float]:
    return [line["loss"] for line in _steps(directory) if "loss" in line]


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
    assert _kl_left(record) < 0.97
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

    def weights(run: training.Training) -> dict[str, Tensor]:
        trained["logits"] = run.pupil.model(IDS, use_cache=False).logits.detach()
        return _trained_weights(run)

    _trained_weights = training.Training.weights
    monkeypatch.setattr(training.Training, "weights", weights)
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
    assert _kl_left(record) < 0.97
    before, after = _weights(one_shot), _weights(out)
    assert before.keys() == after.keys() and not any(torch.equal(before[name], after[name]) for name in before)
    model = care_mla.load(out)
    assert torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight) == tied


def test_healing_again_and_the_records(
    heal: Heal, converted: Converted, settings: dict[str, Any], tmp_path: Path
) -> None:
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
    """A rate that makes it worse: stopped when the gap no longer closes, from half the run on, and the weights are the first ones."""
    record = heal(lr=0.3, patience=2, eval_every=1)
    assert record["stopped_early"] and record["step"] == 5 and record["best_step"] == 0
    before, after = _weights(converted("joint")), _weights(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)


# --- settings that must not change the result --------------------------------------------------------------------------


def _assert_same_run(first: dict[str, Any], second: dict[str, Any], rel: float = 1e-4) -> None:
    for a, b in zip(first["evaluations"], second["evaluations"], strict=True):
        assert a == pytest.approx(b, rel=rel, abs=1e-6)


@pytest.mark.parametrize("changes", [{}, {"train": "all"}])
def test_gradient_checkpointing_and_micro_batches_change_nothing(changes: dict[str, Any], heal: Heal) -> None:
    plain = heal(**changes)
    _assert_same_run(plain, heal(out="checkpointed", gradient_checkpointing=True, **changes))
    _assert_same_run(plain, heal(out="micro", micro_batch_size=3, **changes))


def test_gradient_checkpointing_runs_layers_again(
    heal: Heal, converted: Converted, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted("joint")
    runs, forward = [0], LlamaMLP.forward

    def counted(mlp: LlamaMLP, hidden_states: Tensor) -> Tensor:
        runs[-1] += 1
        return forward(mlp, hidden_states)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    heal()
    runs.append(0)
    heal(out="checkpointed", gradient_checkpointing=True)
    assert runs[1] == runs[0] + 2 * STEPS


@pytest.mark.parametrize(("kind", "trained"), [("joint", "kv"), ("mla", "attention"), ("stock", "kv")])
def test_stored_probabilities_stand_for_the_teacher(
    kind: str, trained: str, heal: Heal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them: the same run. A few: another loss, from a file that a second run reads."""
    _assert_same_run(heal(kind, train=trained), heal(kind, "stored", train=trained, teacher_top_k=300))
    few = {"train": trained, "teacher_top_k": 8, "teacher_logits": tmp_path / "logits", "temperature": 2.0, "lr": 1e-3}
    first = heal(kind, "few", **few)
    assert _kl_left(first) < 1
    (file,) = (tmp_path / "logits").iterdir()
    assert load_file(file)["ids"].shape[-1] == 8
    monkeypatch.setattr(training, "write_top_probabilities", None)  # nothing is stored again
    assert heal(kind, "again", **few)["evaluations"] == first["evaluations"]
    file.write_bytes(b"damaged")
    with pytest.raises(HealingError, match="damaged"):
        heal(kind, "damaged", **few)


def test_text_from_the_teacher_itself(heal: Heal) -> None:
    record = heal(data="self", tokens=2 * BATCH_SIZE * SEQLEN, lr=1e-3)
    assert record["text"] == {"tokens": 2 * BATCH_SIZE * SEQLEN, "held_out_tokens": 2 * SEQLEN}
    assert _kl_left(record) < 1


def test_bfloat16_products(heal: Heal, converted: Converted, tmp_path: Path) -> None:
    record = heal(precision="bfloat16")
    assert _kl_left(record) < 0.97
    assert all(t.dtype == torch.float32 for t in _weights(tmp_path / "out").values())


def test_conversion_heals_as_its_last_stage(
    care: Callable[..., str], converted: Converted, tmp_path: Path, text_file: Path
) -> None:
    recipe = {"rank": 8, "method": "svd", "ranks": "uniform"}
    text = {"calibration": str(text_file), "samples": 4, "seqlen": 32}
    manifest = convert_and_heal(converted("source"), tmp_path / "out", heal_tokens=2048, calibration=text, **recipe)
    (record,) = manifest["healing"]
    assert record["settings"]["data"] == str(text_file)
    assert json.loads((tmp_path / "out" / "care_manifest.json").read_text())["healing"] == [record]
    words = ["--calibration", text_file, "--samples", 4, "--heal-tokens", "2k", "--heal-data", "copy"]
    assert "held-out text" in care("convert", converted("source"), "--out", tmp_path / "two", *_words(recipe), *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "two"]


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [({"heal_tokens": 0}, "tokens"), ({"heal_data": "/no/text.txt"}, "neither a file nor"), ({}, "unfinished run")],
)
def test_what_healing_would_refuse_is_refused_before_the_conversion(
    bad: dict[str, Any], sentence: str, converted: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CONVERT_AND_HEAL, "convert", lambda *_, **__: pytest.fail("converted"))
    if not bad:
        work = tmp_path / "out.healing"
        work.mkdir()
        mark(work, Kind.HEALING, ["*"])
    with pytest.raises(ConversionError, match=sentence):
        convert_and_heal(converted("source"), tmp_path / "out", **{"heal_tokens": 2048, "kv_save": 0.5, **bad})
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.healing" / "one-shot").exists()


def test_a_folder_that_only_looks_like_a_state_is_never_removed(
    converted: Converted, heal: Heal, tmp_path: Path
) -> None:
    theirs = tmp_path / "out.healing" / "poems.txt"
    theirs.parent.mkdir()
    theirs.write_text("theirs")
    for overwrite in (False, True):
        with pytest.raises(ConversionError, match="out.healing"):
            heal(overwrite=overwrite)
        with pytest.raises(ConversionError, match="out.healing"):
            convert_and_heal(converted("source"), tmp_path / "out", heal_tokens=2048, kv_save=0.5, overwrite=overwrite)
    assert theirs.read_text() == "theirs" and [path.name for path in tmp_path.iterdir()] == ["out.healing"]


@pytest.mark.parametrize("where", ["convert", "heal"])
def test_conversion_with_healing_goes_on_by_the_same_call(
    where: str, converted: Converted, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before the first state of the healing, and after it; what is done is not done again."""
    text = {"calibration": str(text_file), "samples": 4, "seqlen": 32}

    def call(heal_tokens: int = 2048, **options: Any) -> dict[str, Any]:
        recipe = {"rank": 8, "method": "svd", "ranks": "uniform", "calibration": text}
        return convert_and_heal(converted("source"), tmp_path / "out", heal_tokens=heal_tokens, **recipe, **options)

    monkeypatch.setattr(*((training, "prepare") if where == "convert" else (loop.Run, "step")), _interrupt)
    with pytest.raises(KeyboardInterrupt):
        call()
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["out.healing"]
    with pytest.raises(HealingError, match="unfinished run"):
        call(heal_tokens=4096)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for resume in (False, True):
        with pytest.raises(HealingError, match="unfinished run of another command"):
            care_mla.heal(converted("joint"), tmp_path / "out", resume=resume, device="cpu")
    assert kept == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.setattr(CONVERT_AND_HEAL, "convert", lambda *_, **__: pytest.fail("converted again"))
    (record,) = call()["healing"]
    assert record["tokens"] == 2048 and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("command", ["heal", "convert"])
def test_unfinished_runs_of_other_versions(
    command: str, heal: Heal, converted: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text_file: Path
) -> None:
    """With settings that no longer exist: refused in one sentence, whose cure works."""
    recipe = {
        "rank": 8,
        "method": "svd",
        "ranks": "uniform",
        "calibration": {"calibration": str(text_file), "samples": 4},
    }

    def call(**options: Any) -> dict[str, Any]:
        if command == "heal":
            return heal(**options)
        whole = convert_and_heal(converted("source"), tmp_path / "out", heal_tokens=2048, **recipe, **options)
        return dict(whole["healing"][0])

    monkeypatch.setattr(loop.Run, "step", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        call()
    monkeypatch.undo()
    path = tmp_path / "out.healing" / "settings.json"
    started = json.loads(path.read_text())
    started["settings"] |= {"layerwise": None, "layerwise_tokens": 0}
    path.write_text(json.dumps(started))
    with pytest.raises(HealingError, match=r"run of another version of care-mla.*; start anew with --overwrite$"):
        call(**({"resume": True} if command == "heal" else {}))
    assert call(overwrite=True)["step"] and [path.name for path in tmp_path.iterdir()] == ["out"]


# --- killed and gone on with ------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from care_mla.cli import main
from care_mla.healing import loop, state

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

step, save = loop.Run.step, state._save
where, number = sys.argv.pop(1), int(sys.argv.pop(1))
if where == "step":
    loop.Run.step = lambda run: die() if run.progress.step == number else step(run)
else:
    state._save = lambda values, directory: (save(values, directory), directory.name.startswith(f"{where}{number}") and die())
main()
"""


@pytest.mark.parametrize("moment", ["step 5", "step- 4"])
def test_killed_and_resumed_is_bit_for_bit_the_same(
    moment: str, heal: Heal, converted: Converted, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Killed in a step, and while a state is written."""
    whole = heal(out="whole")
    words = [sys.executable, "-c", KILLED, *moment.split(), "heal", converted("joint"), "--out", tmp_path / "out"]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums depend on how many share them
    killed = subprocess.run(
        [*words, *_words(settings)], capture_output=True, text=True, timeout=TIMEOUT, env=os.environ | threads
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", "out.healing", "whole"]
    with pytest.raises(HealingError, match="another lr"):
        heal(resume=True, lr=1e-4)
    with pytest.raises(HealingError, match="--resume"):
        heal()
    resumed = care_mla.heal(converted("joint"), tmp_path / "out", resume=True, device="cpu")
    assert resumed["evaluations"] == whole["evaluations"]
    assert _steps(tmp_path / "out") == _steps(tmp_path / "whole")
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_saving_changes_nothing(heal: Heal, tmp_path: Path) -> None:
    """torch initializes an optimizer by stepping it; that step must not count."""
    often, once = (_steps(tmp_path / heal_out) for heal_out in ("often", "once") if heal(
        out=heal_out, eval_every={"often": 1, "once": 6}[heal_out]))  # fmt: skip
    assert [line for line in often if "loss" in line] == [line for line in once if "loss" in line]


def test_killed_before_the_first_state(heal: Heal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first evaluation is done again, and is in the metrics once."""
    heal(out="whole")
    monkeypatch.setattr(state.RunState, "save", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        heal()
    monkeypatch.undo()
    heal(resume=True)
    assert _steps(tmp_path / "out") == _steps(tmp_path / "whole")


def test_damaged_state(
    heal: Heal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(HealingError, match="no run to resume"):
        heal(resume=True)
    monkeypatch.setattr(loop.Run, "step", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        heal()
    monkeypatch.undo()
    for name in ("__0_0.distcp", ".metadata"):
        (tmp_path / "out.healing" / "step-0" / name).write_bytes(b"damaged")
        with pytest.raises(HealingError, match=r"step-0 cannot be read; start anew with --overwrite \(.+\)"):
            heal(resume=True)
    assert not [record for record in caplog.records if record.name == "root"]  # torch's tracebacks
    assert heal(overwrite=True)["step"] == STEPS


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_interrupt_keeps_the_state(converted: Converted, settings: dict[str, Any], tmp_path: Path) -> None:
    words = _words({**settings, "tokens": "100M", "eval_every": 1})
    command = [sys.executable, "-m", "care_mla.cli", "heal", converted("joint"), "--out", tmp_path / "out", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + TIMEOUT
    while not list(tmp_path.glob("out.healing/step-*[0-9]")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130 and "Traceback" not in errors
    assert "interrupted" in errors and f"{tmp_path / 'out.healing'} holds" in errors and "--resume" in errors
    assert [path.name for path in tmp_path.iterdir()] == ["out.healing"]


def test_a_signal_while_saving_waits_for_the_state(heal: Heal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raised inside torch's writer it aborted the process, now and then."""
    save, whole = state.dcp.save, []

    def interrupted(*values: Any, checkpoint_id: Path) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        save(*values, checkpoint_id=checkpoint_id)
        whole.append((checkpoint_id / ".metadata").is_file())

    monkeypatch.setattr(state.dcp, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        heal()
    assert whole == [True]


@pytest.mark.parametrize(
    ("error", "cause", "raised", "message"),
    [
        (RuntimeError("unexpected pos"), KeyboardInterrupt(), KeyboardInterrupt, None),
        (OSError("disk full"), None, HealingError, r"cannot be written \(disk full\)"),
    ],
)
def test_stopped_while_saving(
    heal: Heal,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    cause: BaseException | None,
    raised: type[BaseException],
    message: str | None,
) -> None:
    """An interrupted torch.save complains of its archive, and torch's distributed checkpoint wraps the complaint."""
    save = torch.save

    def stopped(*arguments: Any, **settings: Any) -> None:
        if list(tmp_path.glob("out.healing/step-1.partial")):
            raise error from cause
        save(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", stopped)
        with pytest.raises(raised, match=message):
            heal(eval_every=1)
    assert heal(resume=True, eval_every=1)["step"] == STEPS


# --- several processes ------------------------------------------------------------------------------------------------

SEVERAL = """
import json, sys, traceback
from pathlib import Path
from accelerate.state import PartialState
import care_mla
from care_mla.errors import HealingError
from care_mla.healing import loop
from care_mla.report import figures

def interrupted(run):
    if run.progress.step == 3:
        raise HealingError("interrupted")
    return step(run)

figures._svg = lambda draw, **size: "<svg></svg>"
step = loop.Run.step
PartialState.destroy_process_group = lambda self, group=None: None  # one group for all runs
for run in json.loads(Path(sys.argv[1]).read_text()):
    loop.Run.step = interrupted if "interrupted" in run["out"] else step
    try:
        care_mla.heal(**run)
    except Exception as error:
        Path(run["out"] + ".error").write_text(traceback.format_exc())
"""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("joint", {}),
    "micro-batches": ("mla", {"micro_batch_size": 1, "train": "attention"}),
    "export": ("stock", {"micro_batch_size": 1}),
    "first tokens": ("joint", {"teacher_top_k": 8}),
    "layers again": ("split", {"gradient_checkpointing": True}),
    "all": ("joint", {"train": "all", "micro_batch_size": 1}),
    "interrupted": ("joint", {"train": "attention"}),
    "uneven": ("joint", {"batch_size": 3}),
}


@pytest.fixture(scope="module")
def several(converted: Converted, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """All variants, replicated and sharded, trained by two processes that one torchrun starts."""
    directory = tmp_path_factory.mktemp("several")
    runs = [
        {**SETTINGS, **changes, "data": str(text_file), "model": str(converted(kind)), "out": str(directory / f"{name}-{shard}"), "shard": shard}
        for name, (kind, changes) in VARIANTS.items() for shard in (False, True)
    ]  # fmt: skip
    (directory / "runs.json").write_text(json.dumps(runs))
    (directory / "several.py").write_text(SEVERAL)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, directory / "several.py", directory / "runs.json"], capture_output=True, text=True, timeout=TIMEOUT
    )
    assert done.returncode == 0, done.stderr
    return lambda name, shard: directory / f"{name}-{shard}"


@pytest.mark.xdist_group("several processes")
@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in ("interrupted", "uneven")])
def test_two_processes_are_one(
    name: str, shard: bool, several: Callable[..., Path], heal: Heal, tmp_path: Path
) -> None:
    kind, changes = VARIANTS[name]
    error = several(name, shard).with_name(f"{name}-{shard}.error")
    assert not error.exists(), error.read_text()
    one = heal(kind, **changes)
    two = json.loads((several(name, shard) / "care_heal.json").read_text())
    assert two["processes"] == 2
    _assert_same_run(one, two, rel=1e-3)
    assert _losses(tmp_path / "out") == pytest.approx(_losses(several(name, shard)), rel=1e-3)
    alone, together = _weights(tmp_path / "out"), _weights(several(name, shard))
    assert alone.keys() == together.keys()
    for weight in alone:
        torch.testing.assert_close(alone[weight], together[weight], atol=1e-4, rtol=0)


@pytest.mark.xdist_group("several processes")
@pytest.mark.parametrize("shard", [False, True])
def test_one_process_goes_on_with_what_two_began(
    shard: bool, several: Callable[..., Path], heal: Heal, converted: Converted
) -> None:
    kind, changes = VARIANTS["interrupted"]
    out = several("interrupted", shard)
    resumed = care_mla.heal(converted(kind), out, resume=True, device="cpu")
    assert resumed["processes"] == 1
    _assert_same_run(heal(kind, **changes), resumed, rel=1e-3)


@pytest.mark.xdist_group("several processes")
def test_a_batch_is_shared_out_evenly(several: Callable[..., Path]) -> None:
    path = several("uneven", True)
    error = path.with_name(f"{path.name}.error").read_text().splitlines()[-1]
    assert error.endswith("ConfigError: --batch-size 3 is not a multiple of the 2 processes")
    assert not path.exists()


def test_torchrun_of_the_command(converted: Converted, settings: dict[str, Any], tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = [*torchrun, "care_mla.cli", "heal", converted("joint"), "--out", tmp_path / "out", *_words(settings)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out text") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- what cannot be done ----------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[list[object], str]] = {
    "vocabulary": (["--teacher", "LARGER"], "has a vocabulary of 400, "),
    "tokenizer": (["--teacher", "OTHER"], "another tokenizer"),
    "teacher is absent": (["--teacher", "/no/such/model"], "does not exist"),
    "empty text": (["--data", "EMPTY"], "holds no text"),
    "short text": (["--data", "SHORT"], "less than one block of 32 tokens"),
    "nothing left to train on": (["--eval-blocks", 100000], "nothing is left to train on"),
    "absent text": (["--data", "/no/text.txt"], "neither a file nor"),
    "train": (["--train", "heads"], "'heads' is not one of 'kv', 'attention', 'all'"),
    "no loss": (["--kl-weight", 0], "--kl-weight and --ce-weight are both 0"),
    "no run to resume": (["--resume"], "holds no run to resume"),
    "device": (["--device", "tpu"], "--device 'tpu': a device is cpu, cuda"),
    "tracker": (["--log-with", "paper"], "--log-with paper"),
}  # fmt: skip


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Teachers and texts that do not fit."""
    directory = tmp_path_factory.mktemp("others")
    changes = {"LARGER": {"vocab_size": 400}, "OTHER": {"num_hidden_layers": 2}}
    teachers = {name: write_tiny_model(directory / name, "llama", **entries) for name, entries in changes.items()}
    path = teachers["OTHER"] / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(tokenizer))
    texts = {"EMPTY": directory / "empty.txt", "SHORT": directory / "short.txt"}
    texts["EMPTY"].write_text(" \n")
    texts["SHORT"].write_text("not even one block")
    return {**teachers, **texts}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(
    case: str,
    care: Callable[..., str],
    converted: Converted,
    settings: dict[str, Any],
    others: dict[str, Path],
    tmp_path: Path,
) -> None:
    words, message = REFUSED[case]
    words = [others.get(str(word), word) for word in words]
    code = 2 if case == "train" else 1  # a choice is refused before the command runs
    printed = care("heal", converted("joint"), "--out", tmp_path / "out", *_words(settings), *words, code=code)
    assert message in printed and printed.count("\n") <= 2
    assert not list(tmp_path.iterdir())


def test_only_converted_models_are_healed(
    care: Callable[..., str], converted: Converted, settings: dict[str, Any], tmp_path: Path
) -> None:
    for model, message in (
        ("source", "neither a converted model nor an exported one"),
        ("joint", "would replace the source"),
    ):
        out = tmp_path / "out" if model == "source" else converted("joint")
        printed = care("heal", converted(model), "--out", out, *_words(settings), "--overwrite", code=1)
        assert message in printed and printed.count("\n") <= 2
    assert not list(tmp_path.iterdir())


def test_experts_that_are_fused_in_memory(
    care: Callable[..., str], tiny: Callable[..., Path], tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Their teacher is shared all the same; to train them is refused before anything is trained."""
    source, one_shot, out = tiny("mixtral", num_hidden_layers=2), tmp_path / "one", tmp_path / "out"
    care_mla.convert(source, one_shot, calibration={"samples": 4, "seqlen": 16}, rank=8, method="svd", ranks="uniform")
    assert "--train attention" in care("heal", one_shot, "--out", out, *_words(settings), "--train", "all", code=1)
    assert not list(tmp_path.glob("out*"))
    record = care_mla.heal(one_shot, out, **settings)
    assert record["teacher"]["shares_weights"] and _kl_left(record) < 0.97


def test_usage_errors(care: Callable[..., str], converted: Converted, tmp_path: Path) -> None:
    for tokens in ("many", "", "nan", "inf"):
        assert "64k or 0.25M" in care("heal", converted("joint"), "--out", tmp_path / "out", "--tokens", tokens, code=2)
    assert "--out" in care("heal", converted("joint"), code=2)
    assert "--heal-tokens" in care(
        "convert", converted("source"), "--out", tmp_path / "out", "--heal-data", "copy", code=2
    )
    assert not list(tmp_path.iterdir())


def _poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    losses = loop.Run._losses

    def poisoned(run: loop.Run, rows: Tensor) -> Tensor:
        return losses(run, rows) * (float("nan") if run.progress.step in steps else 1.0)

    monkeypatch.setattr(loop.Run, "_losses", poisoned)


def test_steps_that_are_not_finite_are_skipped(heal: Heal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _poison(monkeypatch, {0, 3})
    record = heal()
    assert record["skipped"] == 2 and record["step"] == STEPS
    assert _kl_left(record) < 1
    assert [line["skipped"] for line in _steps(tmp_path / "out") if "loss" in line] == [1, 1, 1, 2, 2, 2]


def test_too_many_of_them_end_the_run(heal: Heal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _poison(monkeypatch, {3, 4})
    with pytest.raises(HealingError, match=r"not finite in 2 steps.*bad-batch-4.safetensors; lower --lr"):
        heal(max_skipped=1)
    assert [path.name for path in tmp_path.iterdir()] == ["out.healing"]
    blocks = load_file(tmp_path / "out.healing" / "blocks.safetensors")["input_ids"]
    for step in (3, 4):
        bad = load_file(tmp_path / "out.healing" / f"bad-batch-{step}.safetensors")["input_ids"]
        assert len(bad) == BATCH_SIZE and all((blocks == row).all(1).any() for row in bad)


def test_a_rate_far_too_high(heal: Heal, tmp_path: Path) -> None:
    with pytest.raises(HealingError, match="lower --lr"):
        heal(lr=1e30, warmup=0.0)
    assert [path.name for path in tmp_path.iterdir()] == ["out.healing"]


@pytest.mark.parametrize("where", ["care_mla.healing.loop.Run.step", "care_mla.healing.training.load"])
def test_memory_that_runs_out(where: str, heal: Heal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(where, full)
    with pytest.raises(
        ConfigError,
        match="out of memory on cpu .* lower --micro-batch-size .* --seqlen, or give --gradient-checkpointing",
    ):
        heal()
    assert not (tmp_path / "out").exists()
