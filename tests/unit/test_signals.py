"""A signal at any instruction: what is temporary is gone, what is written is whole."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from care_mla import files, interrupts
from care_mla.checkpoint import Kind, claim, scratch


@pytest.fixture(autouse=True)
def _listening(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a command, and as before afterwards."""
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    handlers = {number: signal.getsignal(number) for number in interrupts.SIGNALS}
    interrupts.listen()
    yield
    interrupts.STOP.clear()
    for number, handler in handlers.items():
        signal.signal(number, handler)


class _Dropped:
    """Its finalizer runs as the signal comes."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def _drop() -> None:
    _Dropped()


def _drop_watched() -> None:
    kept = set()
    watched = type("Watched", (), {})()
    kept.add(weakref.ref(watched, lambda _: signal.raise_signal(signal.SIGINT)))
    del watched


@pytest.mark.parametrize("lose", [_drop, _drop_watched])
def test_what_python_cannot_raise_is_not_printed_and_heeded_later(
    lose: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    lose()
    assert capsys.readouterr().err == ""
    with pytest.raises(KeyboardInterrupt):
        interrupts.heed_stop()


def test_finalizers_that_fail_without_a_stop_are_heard(capsys: pytest.CaptureFixture[str]) -> None:
    class Failing:
        def __del__(self) -> None:
            raise ValueError("of its own")

    Failing()
    assert "of its own" in capsys.readouterr().err


@pytest.mark.parametrize("number", interrupts.SIGNALS)
def test_short_steps_are_not_cut_short(number: signal.Signals) -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts.uninterrupted():
        with interrupts.uninterrupted():
            signal.raise_signal(number)
            done.append("inner")
        signal.raise_signal(number)
        done.append("outer")
    assert done == ["inner", "outer"] and interrupts.STOP.is_set()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)


def test_threads_are_never_interrupted() -> None:
    done = []

    def work() -> None:
        with interrupts.uninterrupted():
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done


def test_ignored_signals_stay_ignored_and_the_end_is_deaf() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    interrupts.listen()
    with interrupts.uninterrupted():
        signal.raise_signal(signal.SIGHUP)
    interrupts.stop_listening()
    for number in interrupts.SIGNALS:
        signal.raise_signal(number)


# --- every instruction ------------------------------------------------------------------------------------------------


def _scratch(directory: Path) -> None:
    with scratch() as work:
        (work / "file").touch()


def _output(directory: Path) -> None:
    with claim(directory / "made" / "out", Kind.CONVERTED, overwrite=True) as claimed, claimed.staging() as staging:
        (staging / "file").write_text("new")


def _file(directory: Path) -> None:
    files.write_text(directory / "file", "new")


def _line(directory: Path) -> None:
    files.append_line(directory / "lines", "new")


def _interrupted(run: Callable[[], None], step: int) -> bool:
    """Run with a signal at the n-th instruction of this package and of contextlib; whether it came so far."""
    count = 0
    own = (str(Path(files.__file__).parent), __file__, os.path.join(os.path.dirname(os.__file__), "contextlib.py"))

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(own):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            count += 1
            if count == step:
                sys.settrace(None)
                signal.raise_signal(signal.SIGINT)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return count >= step


@pytest.mark.parametrize("write", [_scratch, _output, _file, _line])
@pytest.mark.parametrize("old", [False, True])
def test_an_interrupt_at_any_instruction_leaves_nothing(
    write: Callable[[Path], None], old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was there is as it was, or replaced by the whole of what is new; a removal that did not begin is made up for at the end.

    CARE_PROPERTY_CASES tries every instruction, otherwise every 23rd.
    """
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "0"))
    monkeypatch.setattr(os, "fsync", lambda _: None)
    step, more, at_the_end = 1, True, 0
    stride = 1 if os.environ.get("CARE_PROPERTY_CASES") else 23
    while more:
        place = tmp_path / "0"
        place.mkdir()
        if old:
            write(place)
        before = _content(place)
        more = _interrupted(lambda place=place: write(place), step)  # type: ignore[misc]
        assert more or _content(place) or write is _scratch
        at_the_end += any(path.exists() for path, if_empty in files._vanishing.items() if not if_empty)
        files.remove_what_vanishes()
        left = {name: text for name, text in _content(place).items() if not name.endswith(".lock")}
        assert left.keys() >= before.keys(), (step, left)
        assert left == before or all(set(text.split()) == {"new"} for text in left.values()), (step, left)
        place.rename(tmp_path / str(step))
        step += stride
    assert step > 60 and at_the_end * stride < 0.1 * step


def _content(directory: Path) -> dict[str, str]:
    """Names and texts of all files but marks, and of directories with nothing in them."""
    found = {}
    for path in sorted(directory.rglob("*")):
        if path.name != "care_files.json" and (path.is_file() or not any(path.iterdir())):
            found[path.relative_to(directory).as_posix()] = path.read_text() if path.is_file() else "empty"
    return found
