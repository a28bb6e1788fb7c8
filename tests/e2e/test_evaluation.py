"""What `care eval` keeps, where, and under which identity."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import care_mla
from care_mla.errors import CalibrationError, CheckpointError

pytestmark = pytest.mark.usefixtures("no_figures")

SHORT = {"seqlen": 24, "windows": 2}


@pytest.fixture
def model(converted: Callable[[str], Path], tmp_path: Path) -> Path:
    """A converted model that may be written into."""
    return Path(shutil.copytree(converted("joint"), tmp_path / "model"))


def _kept(model: Path) -> list[dict[str, object]]:
    path = model / "care_eval.json"
    return json.loads(path.read_text(encoding="utf-8"))["evaluations"] if path.is_file() else []


def test_evaluations_that_differ_are_all_kept_and_the_same_one_is_replaced(
    model: Path, converted: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    records = tmp_path / "records.jsonl"
    records.write_text(json.dumps({"text": "some words " * 40, "other": "1 2 3 4 " * 40}), encoding="utf-8")
    ways = [
        {"text": text_file},
        {"text": text_file, "reference": converted("source")},
        {"text": text_file, "dtype": "bf16"},
        {"text": records, "field": "text"},
        {"text": records, "field": "other"},
    ]
    for _ in range(2):
        for way in ways:
            care_mla.evaluate(model, **SHORT, **way)
    kept = _kept(model)
    assert len(kept) == len(ways)
    assert [e["reference_loss"] is not None for e in kept] == [False, True, False, False, False]
    assert [e["dtype"] for e in kept] == ["float32", "float32", "bfloat16", "float32", "float32"]
    assert {e["device"] for e in kept} == {"cpu"} and kept[1]["reference"] == str(converted("source"))
    assert [e["field"] for e in kept[3:]] == ["text", "other"]
    care_mla.write_report(model)
    page = (model / "care_report.html").read_text(encoding="utf-8")
    assert (
        "bfloat16, cpu" in page and f"{kept[1]['loss_increase']:+.3f}" in page
    )  # the card is of the one with a reference


def test_an_evaluation_of_an_earlier_version_is_replaced_by_the_same_one(model: Path, text_file: Path) -> None:
    care_mla.evaluate(model, str(text_file), **SHORT)
    (old,) = _kept(model)
    for key in ("field", "reference", "dtype", "device"):
        del old[key]
    (model / "care_eval.json").write_text(json.dumps({"evaluations": [old]}), encoding="utf-8")
    care_mla.evaluate(model, str(text_file), **SHORT)
    assert [e.get("dtype") for e in _kept(model)] == ["float32"]


def test_the_command_says_what_it_ran_in(care: Callable[..., str], model: Path, text_file: Path) -> None:
    printed = care("eval", model, "--text", text_file, "--seqlen", 24, "--windows", 2, "--dtype", "torch.bfloat16")
    assert "bfloat16 on cpu" in printed


@pytest.mark.parametrize("place", ["the hub's cache", "a link into it", "a folder that cannot be written"])
def test_results_are_shown_and_not_kept(
    place: str,
    care: Callable[..., str],
    model: Path,
    tmp_path: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    where = model
    if place == "a folder that cannot be written":
        access = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    else:
        where = tmp_path / "cache" / "models--someone--model" / "snapshots" / "0123"
        where.parent.mkdir(parents=True)
        model.rename(where)
    before = {path: path.read_bytes() for path in where.iterdir()}
    named = where
    if place == "a link into it":
        named = tmp_path / "link"
        named.symlink_to(where)
    printed = care("eval", named, "--text", text_file, "--seqlen", 24, "--windows", 2)
    assert "perplexity" in printed and "note: the result is not kept" in printed
    assert {path: path.read_bytes() for path in where.iterdir()} == before


def test_damaged_records_are_said_before_the_model_runs(model: Path, text_file: Path) -> None:
    for damage in ('{"evaluations": null}', '{"evaluations": [{"text": "a"}]}', "[]", "{"):
        (model / "care_eval.json").write_text(damage, encoding="utf-8")
        with pytest.raises(CheckpointError, match=r"care_eval\.json"):
            care_mla.evaluate(model, "/no/text.txt", **SHORT)
    (model / "care_eval.json").unlink()
    (model / "care_spectra.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match=r"care_spectra\.safetensors cannot be read"):
        care_mla.write_report(model)


@pytest.mark.parametrize("damaged", ["model", "reference"])
def test_a_loss_that_is_not_finite_names_whose_and_why(
    damaged: str, tiny: Callable[..., Path], tmp_path: Path, text_file: Path
) -> None:
    intact, broken = tiny(), tiny(directory=tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.inf
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    model, reference = (broken, None) if damaged == "model" else (intact, broken)
    for dtype, why in (("float32", "damaged, or too large"), ("bf16", "overflow in bfloat16: try --dtype float32")):
        with pytest.raises(CalibrationError, match=f"the {damaged}'s loss on this text is not finite.*{why}"):
            care_mla.evaluate(model, str(text_file), reference=reference, dtype=dtype, **SHORT)
