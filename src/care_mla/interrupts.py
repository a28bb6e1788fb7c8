"""How a command is told to stop, and what a stop may not cut short. The standard library alone: it is here before anything is imported."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, current_thread, main_thread
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))
STOP = Event()
"""Set when the command was told to stop. What a signal raises can be lost in a library's callback; the bars look here at every item."""


def heed_stop() -> None:
    """
    Raises:
        KeyboardInterrupt: `STOP` is set.
    """
    if STOP.is_set():
        raise KeyboardInterrupt


def listen() -> None:
    """From now on each of `SIGNALS` sets `STOP` and raises KeyboardInterrupt, unless it is ignored: nohup stays deaf.

    In a finalizer or a weak reference's callback Python prints what is raised and goes on; after a stop it prints nothing.
    """
    STOP.clear()
    sys.unraisablehook = _silent_after_stop(sys.unraisablehook)
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _stop)


def stop_listening() -> None:
    """The command is at its end: a signal more changes nothing, and has no traceback."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _stop(number: int, frame: Any) -> None:
    STOP.set()
    raise KeyboardInterrupt


def _silent_after_stop(report: Callable[[Any], object]) -> Callable[[Any], None]:
    """A `sys.unraisablehook`: a stop half-builds objects, whose finalizers then fail, too."""

    def hook(unraisable: Any) -> None:
        if not STOP.is_set():
            report(unraisable)

    return hook


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Signals that come meanwhile are heeded at the end: for short steps that must not be left half done."""
    if current_thread() is not main_thread():  # the only one that signals interrupt
        yield
        return
    heard = {number: handler for number in SIGNALS if callable(handler := signal.getsignal(number))}
    came: list[tuple[int, Any]] = []
    holding = True

    def hold(number: int, frame: Any) -> None:
        if holding:
            came.append((number, frame))
        else:  # between the end of the steps and the return of its own handler
            heard[signal.Signals(number)](number, frame)

    try:
        for number in heard:
            signal.signal(number, hold)
        yield
    finally:
        holding = False
        for number, handler in heard.items():
            signal.signal(number, handler)
        if came:
            number, frame = came[0]
            heard[signal.Signals(number)](number, frame)
