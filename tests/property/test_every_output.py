"""Properties of everything that is written: for every command, every kind of existing target, every write that fails."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import care_mla
from care_mla import files
from care_mla.checkpoint.outputs import MARK

pytestmark = pytest.mark.usefixtures("no_figures")

TEXT = ["--samples", 4, "--seqlen", 16]
HEALING = ["--tokens", 128, "--batch-size", 2, "--seqlen", 32, "--eval-blocks", 1, "--device", "cpu"]
KINDS = {
    "calibrate": "statistics",
    "convert": "converted",
    "convert and heal": "healed",
    "heal": "healed",
    "export": "exported",
    "fetch": "fetched",
}
"""Command -> the kind of directory that it writes."""


@pytest.fixture(scope="session")
def own(converted: Callable[[str], Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One directory of every kind that care writes."""
    root = tmp_path_factory.mktemp("own")
    care_mla.calibrate(converted("source"), root / "statistics", calibration=str(text_file), samples=4, seqlen=16)
    care_mla.fetch(str(converted("source")), root / "fetched")
    settings = {"tokens": 128, "batch_size": 2, "seqlen": 32, "eval_blocks": 1, "device": "cpu"}
    care_mla.heal(converted("joint"), root / "healed", data=str(text_file), **settings)
    return {
        "converted": converted("joint"),
        "exported": converted("stock"),
        **{kind: root / kind for kind in ("statistics", "fetched", "healed")},
    }


@pytest.fixture
def place(tmp_path: Path, converted: Callable[[str], Path], own: dict[str, Path], text_file: Path) -> Path:
    """A directory with every input: source, stats, joint, mla, text."""
    for name in ("source", "joint", "mla"):
        shutil.copytree(converted(name), tmp_path / "inputs" / name)
    shutil.copytree(own["statistics"], tmp_path / "inputs" / "stats")
    (tmp_path / "inputs" / "texts").mkdir()
    shutil.copy(text_file, tmp_path / "inputs" / "texts" / "text.txt")
    return tmp_path


def _words(command: str, place: Path, out: Path) -> list[object]:
    """A command that writes `out`."""
    inputs = place / "inputs"
    source, text = inputs / "source", inputs / "texts" / "text.txt"
    recipe = [source, "--out", out, "--method", "svd", "--ranks", "uniform", "--kv-save", 0.5]
    return {
        "calibrate": ["calibrate", source, "--out", out, "--calibration", text, *TEXT],
        "convert": ["convert", *recipe, "--stats", inputs / "stats"],
        "convert and heal": [
            "convert", *recipe, "--stats", inputs / "stats", "--heal-tokens", 64, "--heal-data", text
        ],
        "heal": ["heal", inputs / "joint", "--out", out, "--teacher", source, "--data", text, *HEALING],
        "export": ["export", inputs / "mla", "--out", out],
        "fetch": ["fetch", source, out],
    }[command]  # fmt: skip


def _inputs(command: str) -> list[str]:
    """What a command reads, below `inputs`."""
    return {
        "calibrate": ["source", "texts"],
        "convert": ["source", "stats"],
        "convert and heal": ["source", "stats", "texts"],
        "heal": ["joint", "source", "texts"],
        "export": ["mla"],
        "fetch": ["source"],
    }[command]


def _everything(directory: Path) -> dict[str, object]:
    """What is below a directory, links as links."""
    found: dict[str, object] = {}
    for path in sorted(directory.rglob("*")):
        content: object = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(directory))] = (path.lstat().st_ino, content)
    return found


def _existing(kind: str, out: Path, own: dict[str, Path]) -> None:
    """Something that is not the command's own, at `out`."""
    theirs = out.parent / "theirs"
    if kind == "file":
        out.write_text("theirs")
    elif kind == "link to a file":
        theirs.write_text("theirs")
        out.symlink_to(theirs)
    elif kind == "dangling link":
        out.symlink_to(theirs)
    elif kind == "folder":
        out.mkdir()
        (out / "thesis.tex").write_text("theirs")
    elif kind == "link to a folder":
        theirs.mkdir()
        (theirs / "thesis.tex").write_text("theirs")
        out.symlink_to(theirs)
    elif kind == "model of another tool":
        shutil.copytree(own["converted"], out)
        (out / MARK).unlink()
    elif kind == "own, with a file of the user's":
        shutil.copytree(own["converted"], out)
        (out / "notes.txt").write_text("theirs")
    else:
        shutil.copytree(own[kind], out)


FOREIGN = (
    "file",
    "link to a file",
    "dangling link",
    "folder",
    "link to a folder",
    "model of another tool",
    "own, with a file of the user's",
    *sorted(set(KINDS.values())),
)


@pytest.mark.parametrize("command", KINDS)
def test_only_its_own_kind_is_replaced(
    command: str, care: Callable[..., str], place: Path, own: dict[str, Path]
) -> None:
    for kind in FOREIGN:
        if kind == KINDS[command]:
            continue
        work = place / "work"
        work.mkdir()
        _existing(kind, work / "out", own)
        before = _everything(place)
        care(*_words(command, place, work / "out"), code=1)
        printed = care(*_words(command, place, work / "out"), "--overwrite", code=1)
        assert printed.count("\n") == 1 and "work/out" in printed, (kind, printed)
        assert _everything(place) == before, kind
        shutil.rmtree(work)


@pytest.mark.parametrize("command", KINDS)
def test_no_input_is_replaced(command: str, care: Callable[..., str], place: Path, own: dict[str, Path]) -> None:
    """The input itself, what holds it, a link to it, and what lies in it; even where all of it is care's own."""
    names = _inputs(command)
    targets = [place, place / "inputs", place / "link"]
    targets += [place / "inputs" / name for name in names]
    targets += [place / "inputs" / name / "inside" for name in names if name != "texts"]
    (place / "link").symlink_to(place / "inputs" / names[0])
    before = _everything(place)
    for out in targets:
        printed = care(*_words(command, place, out), "--overwrite", code=1)
        assert "would replace" in printed or "lies inside" in printed, (out, printed)
        assert _everything(place) == before, out


@pytest.mark.parametrize("command", KINDS)
def test_its_own_kind_is_replaced_when_asked(
    command: str, care: Callable[..., str], place: Path, own: dict[str, Path]
) -> None:
    work = place / "work"
    work.mkdir()
    shutil.copytree(own[KINDS[command]], work / "out")
    (work / "out" / "care_report.html").write_text("old")
    before = _everything(place)
    assert "--overwrite" in care(*_words(command, place, work / "out"), code=1)
    assert _everything(place) == before
    care(*_words(command, place, work / "out"), "--overwrite")
    report = work / "out" / "care_report.html"
    assert [path.name for path in work.iterdir()] == ["out"] and not (report.exists() and report.read_text() == "old")
    assert {k: v for k, v in _everything(place).items() if k.startswith("inputs")} == {
        k: v for k, v in before.items() if k.startswith("inputs")
    }


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_single_files_of_the_user_are_never_replaced(option: str, care: Callable[..., str], place: Path) -> None:
    inputs = place / "inputs"
    plan = ["plan", inputs / "source", "--stats", inputs / "stats", "--method", "svd", "--kv-save", 0.5]
    file = place / ("mine.json" if option == "--json" else "mine.svg")
    quiet = [] if option == "--plot" else ["--plot", place / "plan.svg"]
    file.write_text("mine")
    assert "did not write it" in care(*plan, *quiet, option, file, code=1) and file.read_text() == "mine"
    file.unlink()
    for _ in range(2):
        care(*plan, *quiet, option, file)
    assert file.stat().st_size > 100
    if option == "--json":
        words = ["eval", inputs / "joint", "--text", inputs / "texts" / "text.txt", "--seqlen", 16, "--windows", 1]
        taken = inputs / "source" / "config.json"
        assert "did not write it" in care(*words, "--json", taken, code=1)


WRITING = [*KINDS, "eval", "report", "plan"]


def _recorded(out: Path) -> list[str]:
    return list(json.loads((out / MARK).read_text())["files"])


@pytest.mark.parametrize("command", WRITING)
def test_a_full_disk_at_any_write_is_one_sentence(
    command: str, care: Callable[..., str], place: Path, own: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-th time that something written is made to last, the disk is full; n grows until the command goes through.

    CARE_PROPERTY_CASES tries every n; otherwise the first ones and some between.
    """
    inputs, work, sync = place / "inputs", place / "work", files.sync
    shutil.copytree(own["converted"], inputs / "judged")
    more = {
        "eval": ["eval", inputs / "judged", "--text", inputs / "texts" / "text.txt", "--seqlen", 16, "--windows", 1],
        "report": ["report", inputs / "judged"],
        "plan": [
            "plan", inputs / "source", "--stats", inputs / "stats", "--method", "svd", "--kv-save", 0.5,
            "--plot", work / "plan.svg", "--json", work / "plan.json",
        ],
    }  # fmt: skip
    words = more.get(command) or _words(command, place, work / "out")
    calls = 0

    def full(path: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == limit:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(path)

    monkeypatch.setattr(files, "sync", full)
    monkeypatch.setattr("care_mla.checkpoint.outputs.sync", full)
    limit = 0
    work.mkdir()
    care(*words)  # how often it writes
    writes = calls
    assert writes > 0
    every = range(1, writes + 1)
    some = (
        every
        if os.environ.get("CARE_PROPERTY_CASES")
        else sorted({1, 2, writes // 3, 2 * writes // 3, writes - 1, writes} & set(every))
    )
    for limit in some:
        shutil.rmtree(work)
        work.mkdir()
        before, calls = _everything(inputs), 0
        printed = care(*words, code=1)
        sentence = printed.strip().splitlines()[-1]
        assert sentence.startswith("error: ") and "cannot be written" in sentence and "full" in sentence, (
            limit,
            printed,
        )
        left = [path.name for path in work.iterdir() if path.name != "out.healing"]
        if limit == writes and left:  # the folder it was renamed in: the output stands, and is whole
            assert command == "plan" or all((work / "out" / name).is_file() for name in _recorded(work / "out"))
        else:
            assert left in ([], ["plan.svg"], ["plan.json"]), (limit, left)
        if command not in ("eval", "report"):  # an evaluation may be kept whose report could not be drawn
            assert _everything(inputs) == before
