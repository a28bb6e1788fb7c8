"""Stopped by a signal, killed, started twice: nothing half-written, nothing of another process touched, nothing left for good."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from tiny import COMMON, TINY

from care_mla.checkpoint import locked
from care_mla.files import write_json

CARE = [sys.executable, "-c", "from care_mla.cli import main; main()"]
TIMEOUT = 300

Care = Callable[..., str]


@pytest.fixture
def words(tiny: Callable[..., Path], tmp_path: Path, text_file: Path) -> list[object]:
    """A calibration that takes longer than any test, into work/out."""
    (tmp_path / "work").mkdir()
    out = tmp_path / "work" / "out"
    return ["calibrate", tiny(), "--out", out, "--calibration", text_file, "--samples", 100_000, "--seqlen", 64]


def _start(words: list[object], **options: object) -> subprocess.Popen[str]:
    """Start a command and wait until it has begun to write."""
    command = [*CARE, *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload]
    work = Path(str(words[words.index("--out") + 1])).parent
    deadline = time.monotonic() + TIMEOUT
    while not list(work.glob(".out.partial-*/care_files.json")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing(how: signal.Signals, words: list[object], tmp_path: Path) -> None:
    process = _start(words)
    time.sleep(0.5)
    process.send_signal(how)
    _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130 and "interrupted" in errors and "Traceback" not in errors
    assert list((tmp_path / "work").iterdir()) == []


def _in_a_library() -> None:
    with suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)


def _in_a_finalizer() -> None:
    class Group:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    Group()


def _in_a_callback() -> None:
    def raising(_: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    watched = type("Watched", (), {})()
    kept = weakref.ref(watched, raising)
    del watched
    assert kept() is None


@pytest.mark.parametrize("lost", [_in_a_library, _in_a_finalizer, _in_a_callback])
def test_an_interrupt_that_is_lost_is_heeded_at_the_next_item(
    lost: Callable[[], None],
    care: Care,
    tiny: Callable[..., Path],
    tmp_path: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It does not show as "Exception ignored in ..." either."""
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)  # pytest's would keep what is printed
    words = ["calibrate", tiny(), "--calibration", text_file, "--samples", 4, "--seqlen", 32, "--batch-size", 1]
    monkeypatch.setattr("transformers.LlamaForCausalLM.eval", lambda model: lost() or model.train(False))
    printed = care(*words, "--out", tmp_path / "out", code=130)
    assert "interrupted" in printed and "ignored" not in printed and "Traceback" not in printed, printed
    assert not (tmp_path / "out").exists()


def test_nohup_stays_deaf(words: list[object]) -> None:
    process = _start(words, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=TIMEOUT)


def test_two_at_once_and_what_a_kill_leaves(care: Care, words: list[object], tmp_path: Path) -> None:
    """The second is refused while the first runs; when that is killed, the next one cleans up after it."""
    process, work = _start(words), tmp_path / "work"
    quick = [*words[:-3], 4, *words[-2:]]
    before = sorted(work.iterdir())
    for more in ([], ["--overwrite"]):
        assert "another care process" in care(*quick, *more, code=1)
    assert sorted(work.iterdir()) == before and process.poll() is None
    process.kill()
    process.communicate()
    assert not (work / "out").exists() and list(work.iterdir())
    care(*quick)
    assert [path.name for path in work.iterdir()] == ["out"]


def test_the_command_listens_before_it_imports(tmp_path: Path) -> None:
    """Ctrl-C while torch is imported, which takes seconds: what starts `care` imports nothing but Python's own."""
    code = """
import sys
from care_mla.cli import main
assert not {"torch", "typer", "rich", "transformers", "pydantic"} & set(sys.modules)
class Interrupt:
    def find_spec(self, name, path, target=None):
        if name == WHERE:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
sys.argv = ["care", "inspect", sys.argv[1]]
main()
"""
    write_json(tmp_path / "config.json", {**COMMON, **TINY["gemma2"]})  # not ordinary: transformers is asked
    for where in ("typer", "torch", "transformers", "care_mla.pipeline"):
        run = [sys.executable, "-c", code.replace("WHERE", repr(where)), str(tmp_path)]
        done = subprocess.run(run, capture_output=True, text=True, timeout=TIMEOUT)
        assert done.returncode == 130 and done.stderr.startswith("interrupted"), (where, done.stderr)
        assert "Traceback" not in done.stderr


def test_full_terminals_and_closed_pipes(tiny: Callable[..., Path]) -> None:
    command = [*CARE, "inspect", str(tiny())]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "No space left" in done.stderr
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT)
    os.close(writer)
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_several_processes(converted: Callable[[str], Path], tmp_path: Path, text_file: Path) -> None:
    """Under torchrun the lock holds for all processes, though one of them takes it."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "care_mla.cli"]
    heal = ["heal", converted("joint"), "--data", text_file, "--tokens", 128, "--seqlen", 32, "--batch-size", 2]
    command = [*run, *map(str, heal), "--eval-blocks", "1", "--device", "cpu", "--out", str(tmp_path / "out")]
    with locked(tmp_path / "out"):
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode != 0 and "another care process" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_shares_no_work_refuses_several_processes(
    care: Care, words: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "2 processes were started" in care(*words, code=1)


def test_an_error_that_a_lost_signal_leads_to(
    care: Callable[..., str], converted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' lazy imports can lose a KeyboardInterrupt, and fail on what it left half imported."""

    def half_imported() -> None:
        with suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        raise ImportError("cannot import name 'ALL_ATTENTION_FUNCTIONS' from partially initialized module")

    monkeypatch.setattr("care_mla.cli.quiet_libraries", half_imported)
    assert "interrupted; nothing was written" in care("inspect", converted("source"), code=130)
