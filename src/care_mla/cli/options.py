"""Options that several subcommands share, so that they read the same everywhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from care_mla.cli import Interrupted
from care_mla.cli.terminal import say
from care_mla.files import require_own_file

Source = Annotated[str, typer.Argument(help="Hugging Face model directory or hub id.", metavar="SOURCE")]
Revision = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit of a hub id; as good as NAME@REVISION.")
]
Out = Annotated[Path, typer.Option("--out", help="Directory to write; appears whole or not at all.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing directory.")]
Device = Annotated[
    str | None,
    typer.Option(
        "--device", help="Where models run: cpu, cuda, cuda:1, xpu, mps.  [default: the accelerator there is, else cpu]"
    ),
]
DType = Annotated[
    str, typer.Option("--dtype", help="In which models run: auto (as stored), float32, bfloat16 or float16.")
]
Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        help="Text to calibrate on: alpaca, wikitext2, c4, ptb, a .txt/.json/.jsonl/.parquet file, `self` (sampled from the model), `copy` (random "
        "strings said twice, which show how a model copies), "
        "or a mix such as alpaca:0.5,file.jsonl:0.5.  [default: self]",
    ),
]
Field = Annotated[
    str | None, typer.Option("--field", help="Field of a record that holds the text, or the messages of a chat.")
]
Samples = Annotated[int | None, typer.Option("--samples", help="Calibration windows.  [default: 128]")]
Seqlen = Annotated[int | None, typer.Option("--seqlen", help="Tokens in a window.  [default: 256]")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of the window positions.  [default: 42]")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", help="Windows in one forward pass.  [default: 8]")]
Pack = Annotated[
    bool | None,
    typer.Option(
        "--pack/--no-pack", help="Windows of the joined text, or one padded window a document.  [default: pack]"
    ),
]

MinRank = Annotated[int | None, typer.Option("--min-rank", help="Smallest rank of a latent.")]
MaxRank = Annotated[int | None, typer.Option("--max-rank", help="Largest rank of a latent.")]
RankMultiple = Annotated[int | None, typer.Option("--rank-multiple", help="Ranks are multiples of this.  [default: 1]")]


def given(**options: object) -> dict[str, object]:
    """Only the options that the user set; the rest keep the defaults of `config.py`."""
    return {name: value for name, value in options.items() if value is not None}


def show_notes(notes: Iterable[str]) -> None:
    """What the user should know though nothing failed."""
    for note in notes:
        say(note, head="note: ", style="yellow", stderr=True)


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
        require_own_file(path, "--json")


SCALES = {"k": 1e3, "m": 1e6, "b": 1e9}


def count_of(text: str | None, option: str) -> int | None:
    """A number of tokens: 64000, 64k, 0.25M, 1e6."""
    if text is None:
        return None
    scale = SCALES.get(text[-1:].lower())
    try:
        return int(float(text[:-1]) * scale) if scale else int(float(text))
    except (ValueError, OverflowError) as error:
        raise typer.BadParameter(f"{option} {text!r}: a number of tokens, e.g. 64000, 64k or 0.25M") from error


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
