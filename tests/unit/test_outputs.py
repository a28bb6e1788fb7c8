"""What care writes appears whole or not at all, one process at a time, and in the place of nothing but its own."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from care_mla import files
from care_mla.checkpoint import Kind, claim, locked, scratch
from care_mla.checkpoint import outputs as outputs_module
from care_mla.checkpoint.outputs import MARK, mark, remove, require_apart
from care_mla.errors import CheckpointError, ConfigError, ConversionError


def _make(out: Path, kind: Kind = Kind.CONVERTED, *, overwrite: bool = False, content: str = "new") -> None:
    with claim(out, kind, overwrite=overwrite) as claimed, claimed.staging() as staging:
        (staging / "file").write_text(content)


# --- files ------------------------------------------------------------------------------------------------------------


def test_files_are_whole_and_readable_by_others(tmp_path: Path) -> None:
    os.umask(0o022)
    files.write_json(tmp_path / "a.json", {"path": "caf\udce9", "é": 1})
    files.write_tensors(tmp_path / "t.safetensors", {"t": torch.arange(6).view(2, 3).T})
    files.copy_file(tmp_path / "a.json", tmp_path / "b.json")
    files.append_line(tmp_path / "lines", "one")
    files.append_line(tmp_path / "lines", "two")
    assert json.loads((tmp_path / "b.json").read_text(encoding="utf-8")) == {"path": "caf\udce9", "é": 1}
    assert load_file(tmp_path / "t.safetensors")["t"].shape == (3, 2)
    assert (tmp_path / "lines").read_text() == "one\ntwo\n"
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o644}


@pytest.mark.parametrize("write", ["json", "tensors", "copy"])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "quota"),
        (OSError(errno.EFBIG, "File too large"), "File too large"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "is full"),
    ],
)
def test_a_write_that_fails_is_one_sentence_and_changes_nothing(
    write: str, error: Exception, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "target"
    path.write_text("old\n")

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(files, "sync", fail)
    writes: dict[str, Callable[[], None]] = {
        "json": lambda: files.write_json(path, {}),
        "tensors": lambda: files.write_tensors(path, {"t": torch.zeros(3)}),
        "copy": lambda: files.copy_file(Path(__file__), path),
    }
    with pytest.raises(CheckpointError, match=f"target cannot be written: .*{reason}"):
        writes[write]()
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["target"] and path.read_text() == "old\n"


@pytest.mark.parametrize("write", ["json", "tensors", "copy", "line"])
def test_limits_of_the_system_are_one_sentence(write: str, tmp_path: Path) -> None:
    path, large = tmp_path / "target", tmp_path / "large"
    path.write_text("old\n")
    large.write_bytes(bytes(5000))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    writes: dict[str, Callable[[], None]] = {
        "json": lambda: files.write_json(path, {"x": "x" * 5000}),
        "tensors": lambda: files.write_tensors(path, {"t": torch.zeros(2000)}),
        "copy": lambda: files.copy_file(large, path),
        "line": lambda: files.append_line(path, "x" * 5000),
    }
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="target cannot be written: "):
            writes[write]()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["large", "target"] and path.read_text() == "old\n"


def test_temporary_files_of_dead_processes_are_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = [tmp_path / f".plan[1].json.{process}.partial" for process in (dead.pid, os.getppid())]
    for path in left:
        path.touch()
    files.write_json(tmp_path / "plan[1].json", {})
    assert [path.exists() for path in left] == [False, True]


def test_streams_are_written_as_they_are(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    files.write_text(pipe, "hello")
    assert os.read(reader, 10) == b"hello" and stat.S_ISFIFO(pipe.stat().st_mode)
    os.close(reader)
    before = Path("/dev/null").stat().st_ino
    files.write_text(Path("/dev/null"), "gone")
    assert Path("/dev/null").stat().st_ino == before


def test_files_of_others_are_not_replaced(tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs.json", tmp_path / "ours.json"
    theirs.write_text("{}")
    files.write_json(ours, {"format": "care-mla plans 1"})
    files.require_own_file(ours, "--json")
    files.require_own_file(tmp_path / "absent.json", "--json")
    files.require_own_file(Path("/dev/stdout"), "--json")
    for path, why in ((theirs, "did not write"), (tmp_path, "exists"), (tmp_path / "no" / "x", "not a directory")):
        with pytest.raises(CheckpointError, match=why):
            files.require_own_file(path, "--json")


# --- directories ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_failure_leaves_nothing(error: BaseException, tmp_path: Path) -> None:
    out = tmp_path / "made" / "too" / "out"
    with pytest.raises(type(error)), claim(out, Kind.CONVERTED) as claimed, claimed.staging() as staging:
        (staging / "half").write_text("written")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_own_directory_is_replaced_when_asked_and_survives_a_failure(tmp_path: Path) -> None:
    out = tmp_path / "out"
    _make(out, content="old")
    with pytest.raises(CheckpointError, match="--overwrite"):
        _make(out)
    with pytest.raises(RuntimeError), claim(out, Kind.CONVERTED, overwrite=True) as claimed, claimed.staging():
        raise RuntimeError("boom")
    assert (out / "file").read_text() == "old"
    _make(out, overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == [MARK, "file"] and (out / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert stat.S_IMODE(out.stat().st_mode) == 0o755


def _users_folder(out: Path) -> None:
    out.mkdir()
    (out / "precious").write_text("theirs")


def _another_kind(out: Path) -> None:
    _make(out, Kind.STATISTICS)


def _with_a_note_inside(out: Path) -> None:
    _make(out)
    (out / "notes").mkdir()
    (out / "notes" / "today.txt").write_text("theirs")


def _with_a_link_inside(out: Path) -> None:
    _make(out)
    (out / "link").symlink_to(out.parent)


def _file(out: Path) -> None:
    out.write_text("theirs")


def _dangling_link(out: Path) -> None:
    out.symlink_to(out.parent / "absent")


def _link_to_users_folder(out: Path) -> None:
    _users_folder(out.parent / "elsewhere")
    out.symlink_to(out.parent / "elsewhere")


def _forged_mark(out: Path) -> None:
    _users_folder(out)
    (out / MARK).write_text('{"format": "of somebody else"}')


def _unreadable_mark(out: Path) -> None:
    _users_folder(out)
    (out / MARK).write_bytes(b"\xff")


@pytest.mark.parametrize(
    "existing",
    [
        _users_folder,
        _another_kind,
        _with_a_note_inside,
        _with_a_link_inside,
        _file,
        _dangling_link,
        _link_to_users_folder,
        _forged_mark,
        _unreadable_mark,
    ],
)
def test_what_is_not_cares_own_of_that_kind_is_never_replaced(existing: Callable[[Path], None], tmp_path: Path) -> None:
    existing(tmp_path / "out")
    before = {path: path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")}
    with pytest.raises(CheckpointError, match="exists and is not"):
        _make(tmp_path / "out", overwrite=True)
    assert {path: path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")} == before


def test_evaluations_and_reports_may_have_come_later(tmp_path: Path) -> None:
    out = tmp_path / "out"
    _make(out)
    for name in ("care_eval.json", "care_report.html", ".DS_Store"):
        (out / name).touch()
    _make(out, overwrite=True)


def test_a_link_to_an_own_directory_stays(tmp_path: Path) -> None:
    _make(tmp_path / "big" / "out")
    (tmp_path / "out").symlink_to(tmp_path / "big" / "out")
    _make(tmp_path / "out", overwrite=True, content="again")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "big" / "out" / "file").read_text() == "again"


def test_inputs_are_never_replaced_nor_written_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, text = tmp_path / "models" / "source", tmp_path / "texts" / "text.txt"
    blob = tmp_path / "blobs" / "weights"
    for file in (source / "config.json", text, blob):
        file.parent.mkdir(parents=True)
        file.touch()
    (source / "model.safetensors").symlink_to(blob)
    (tmp_path / "alias").symlink_to(source)
    inputs = [("the source", source), ("the text", text), ("the absent", tmp_path / "absent")]
    for out in (source, tmp_path / "models", tmp_path / "alias", tmp_path, text.parent, blob.parent):
        with pytest.raises(ConfigError, match="would replace the"):
            require_apart(out, inputs)
    for out in (source / "new", tmp_path / "alias" / "deep" / "new"):
        with pytest.raises(ConfigError, match="lies inside the source"):
            require_apart(out, inputs)
    for out in (tmp_path / "models" / "other", text.parent / "new", tmp_path / "source"):
        require_apart(out, inputs)
    monkeypatch.chdir(text.parent)
    for here in (Path("."), Path(".."), text.parent):
        with pytest.raises(ConfigError, match="current directory"):
            require_apart(here, [])


def test_names_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").touch()
    for out in (tmp_path / ("x" * 300), tmp_path / "loop", tmp_path / "loop" / "out", tmp_path / "file" / "out", Path("a\0b"), Path("/")):  # fmt: skip
        with pytest.raises(ConversionError, match="^--out "):
            _make(out)
    _make(tmp_path / ("x" * 250))
    _make(tmp_path / os.fsdecode(b"caf\xe9"))


def test_one_process_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with claim(out, Kind.CONVERTED) as claimed:
        for kind in (Kind.CONVERTED, Kind.STATISTICS):
            with pytest.raises(CheckpointError, match="another care process"), claim(out, kind):
                pass
        with pytest.raises(CheckpointError, match="another care process"), locked(out):
            pass
        with claimed.staging() as staging:
            (staging / "file").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with locked(out):
        pass


def test_a_target_that_came_into_being_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="what was made is in .*out-2"):  # noqa: SIM117
        with claim(out, Kind.CONVERTED) as claimed, claimed.staging() as staging:
            (staging / "file").write_text("made")
            _users_folder(out)
    assert (out / "precious").read_text() == "theirs" and (tmp_path / "out-2" / "file").read_text() == "made"


def test_leftovers_of_killed_processes_are_named_and_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "out"
    partial, theirs = tmp_path / ".out.partial-0123abcd", tmp_path / ".out.partial-holiday"
    for directory in (partial, theirs):
        directory.mkdir()
        (directory / "file").touch()
    mark(partial, Kind.CONVERTED)
    with caplog.at_level(logging.WARNING):
        _make(out)
    assert str(partial) in caplog.text and not partial.exists() and (theirs / "file").exists()


def test_a_directory_that_was_moved_aside_comes_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    _make(out, content="old")
    out.rename(tmp_path / ".out.replaced-0123abcd")
    with pytest.raises(CheckpointError, match="--overwrite"):
        _make(out)
    assert (out / "file").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("renames", [1, 2])
def test_interrupted_while_it_takes_the_place(renames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, count, rename = tmp_path / "out", 0, Path.rename
    _make(out, content="old")

    def interrupted(self: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count == renames:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _make(out, overwrite=True)
    monkeypatch.undo()
    assert (out / "file").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_removal_that_was_killed_is_known_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _make(tmp_path / "out")
    monkeypatch.setattr(outputs_module.shutil, "rmtree", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        remove(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [MARK]


def test_full_disk_is_seen_before(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="MB are needed"), claim(tmp_path / "out", Kind.CONVERTED) as claimed:  # noqa: SIM117
        with claimed.staging(10**18):
            raise AssertionError("must not be entered")
    assert list(tmp_path.iterdir()) == []


def test_scratch_of_killed_processes_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs_module.tempfile, "gettempdir", lambda: str(tmp_path))
    left, theirs = tmp_path / "care-mla-left", tmp_path / "care-mla-notes"
    for directory in (left, theirs):
        directory.mkdir()
        (directory / "file").touch()
    mark(left, Kind.SCRATCH)
    with scratch() as first, scratch() as second:
        assert first.is_dir() and second.is_dir() and not left.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["care-mla-notes"]
