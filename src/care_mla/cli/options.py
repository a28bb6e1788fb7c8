"""Arguments and options that several subcommands share and no settings hold, so that they read the same everywhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from care_mla.cli import Interrupted
from care_mla.cli.terminal import say
from care_mla.config.base import RUN_PANEL

Source = Annotated[str, typer.Argument(help="Hugging Face model directory or hub id.", metavar="SOURCE")]
Revision = Annotated[
    str | None,
    typer.Option(
        "--revision",
        help="Branch, tag or commit of a hub id; as good as NAME@REVISION.",
        rich_help_panel=RUN_PANEL,
        show_default="main",
        metavar="NAME",
    ),
]
Out = Annotated[Path, typer.Option("--out", help="Directory to write; appears whole or not at all.", metavar="DIR")]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace what this command wrote there before.", rich_help_panel=RUN_PANEL),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="Where models run: cpu, cuda, cuda:1, xpu, mps.",
        show_default="the accelerator there is, else cpu",
        rich_help_panel=RUN_PANEL,
        metavar="NAME",
    ),
]
DType = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="In which models run: auto (as stored), float32, bfloat16 or float16.",
        rich_help_panel=RUN_PANEL,
        metavar="DTYPE",
    ),
]
Json = Annotated[
    Path | None, typer.Option("--json", help="Write the numbers here too.", show_default="not written", metavar="FILE")
]


def examples(*lines: str) -> str:
    """The last part of a command's help: what people type."""
    return "Examples:\n\n" + "\n\n".join(f"`{line}`" for line in lines)


def show_notes(notes: Iterable[str]) -> None:
    """What the user should know though nothing failed."""
    for note in notes:
        say(note, head="note: ", style="yellow", stderr=True)


def show_next(*commands: str) -> None:
    """What to run now."""
    for index, command in enumerate(commands):
        say(command, head="next: " if index == 0 else "  or: ", style="dim")


def numbers(text: str, option: str) -> list[float]:
    """Comma-separated numbers."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{option} {text!r}: numbers separated by commas, e.g. 0.5,0.75") from error


def require_json(path: Path | None) -> None:
    """A file that --json may write.

    Raises:
        CheckpointError
    """
    if path is not None:
        from care_mla.files import require_own_file

        require_own_file(path, "--json")


@contextmanager
def interruptible(kept: Callable[[], str]) -> Iterator[None]:
    """Ctrl-C says what is kept, if anything is."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise Interrupted("; ".join(filter(None, ("nothing was written", kept())))) from interrupt


def is_main_process() -> bool:
    """Whether this process prints results; torchrun and accelerate launch number their processes."""
    return os.environ.get("RANK", "0") == "0"
