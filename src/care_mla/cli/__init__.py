"""The `care` command. One file a subcommand; each is a thin skin over a function of `care_mla`.

Nothing but the standard library is imported before `main` listens for Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from care_mla.interrupts import STOP, listen, stop_listening

if TYPE_CHECKING:
    import typer

INTERRUPTED = 130
DEBUG = "CARE_DEBUG"
"""Environment variable: set, an error that nobody foresaw shows where it came from."""


class Interrupted(Exception):  # noqa: N818  (as KeyboardInterrupt)
    """Ctrl-C where something is kept; the message says what."""


def main() -> None:
    """Entry point: a `ConversionError` is one sentence and exit code 1; Ctrl-C, SIGTERM and SIGHUP clean up and exit with 130."""
    try:
        code = _run()
        stop_listening()
    except (KeyboardInterrupt, Interrupted) as interrupt:
        stop_listening()
        kept = str(interrupt) if isinstance(interrupt, Interrupted) else "nothing was written"
        _complain(f"interrupted; {kept}")
        code = INTERRUPTED
    except BrokenPipeError:  # `care inspect X | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)


def _run() -> int:
    """Run the command that was typed; its exit code."""
    listen()
    import typer

    from care_mla.cli.application import say_what_was_meant
    from care_mla.cli.terminal import take_any_character
    from care_mla.errors import ConversionError
    from care_mla.registration import when_imported

    take_any_character()
    try:
        when_imported(quiet_libraries)
        code = _app()(standalone_mode=False)  # typer returns the code of an Exit; 130 is its word for Ctrl-C
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        sys.stdout.flush()
        return int(code or 0)
    except typer.Abort as abort:
        raise KeyboardInterrupt from abort
    except (BrokenPipeError, Interrupted):
        raise
    except Exception as error:
        if STOP.is_set():  # a library lost what the signal raised, in an import most often, and went on with half of it
            raise KeyboardInterrupt from error
        if isinstance(error, ConversionError):
            return _complain(error, head="error: ")
        if hasattr(error, "format_message"):  # a usage error of typer's parser
            return _complain(say_what_was_meant(error), head="error: ", code=2)
        if os.environ.get(DEBUG):
            raise
        return _complain(_unforeseen(error), head="error: ")


def _unforeseen(error: Exception) -> str:
    """One sentence on an error that nobody foresaw."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out of memory; take a smaller --batch-size, --seqlen or model"
    words = " ".join(str(error).split()) or "no message"
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror}"
    return f"unforeseen {type(error).__name__}: {words[:300]}; this is a fault of care-mla, {DEBUG}=1 shows where"


def _complain(text: object, *, head: str = "", code: int = 1) -> int:
    try:
        from care_mla.cli.terminal import say

        say(str(text), head=head, style="bold red", stderr=True)
    except OSError:  # a terminal that is gone, or a full disk behind 2>
        code = max(code, 1)
    return code


def _app() -> typer.Typer:
    from care_mla.cli import calibrate, convert, evaluate, export, fetch, heal, inspect, plan, report  # noqa: F401  (registration)
    from care_mla.cli.application import app

    return app


def quiet_libraries() -> None:
    """transformers' own bars and notices would tear ours."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
