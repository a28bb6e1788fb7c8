"""The `care` command. One file a subcommand; each is a thin skin over a function of `care_mla`."""

from __future__ import annotations

import signal
import sys
from typing import Any

import typer
from rich.console import Console

from care_mla.errors import ConversionError

app = typer.Typer(
    name="care",
    help="Turn a pretrained MHA/GQA language model into Multi-head Latent Attention, and measure what it costs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


INTERRUPTED = 130


class Interrupted(Exception):  # noqa: N818  (as KeyboardInterrupt)
    """Ctrl-C where something is kept; the message says what."""


def main() -> None:
    """Entry point: a `ConversionError` is one sentence and exit code 1; Ctrl-C cleans up and exits with 130."""
    errors = Console(stderr=True)
    try:
        signal.signal(signal.SIGTERM, _as_interrupt)
        quiet_libraries()
        from care_mla.cli import calibrate, convert, evaluate, export, fetch, heal, inspect, plan, report  # noqa: F401  (registration)

        code = app(standalone_mode=False)  # typer returns the code of an Exit; 130 is its word for Ctrl-C
        if code == INTERRUPTED:
            raise KeyboardInterrupt
    except ConversionError as error:
        errors.print(f"[bold red]error:[/] {_escaped(error)}", soft_wrap=True, highlight=False)
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort, Interrupted) as interrupt:
        kept = str(interrupt) if isinstance(interrupt, Interrupted) else "nothing was written"
        errors.print(f"interrupted; {_escaped(kept)}", soft_wrap=True, highlight=False)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of typer's parser
            errors.print(f"[bold red]error:[/] {_escaped(error.format_message())}", soft_wrap=True, highlight=False)
            sys.exit(2)
        raise
    sys.exit(code or 0)


def _as_interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _escaped(text: object) -> str:
    from rich.markup import escape

    return escape(str(text))


def quiet_libraries() -> None:
    """transformers' own bars and notices would tear ours."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
