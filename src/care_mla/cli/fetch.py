"""care fetch"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

import care_mla
from care_mla.cli import options
from care_mla.cli.adapter import options_from
from care_mla.cli.application import app
from care_mla.cli.terminal import console, quoted, say


@app.command(
    epilog=options.examples(
        "care fetch smollm2-135m MODEL", "care fetch model.gguf MODEL", "care fetch Qwen/Qwen3-4B MODEL"
    )
)
@options_from()
def fetch(
    name: Annotated[str, typer.Argument(help="smollm2-135m, a .gguf file, or a hub id.", metavar="NAME")],
    directory: Annotated[Path, typer.Argument(help="Directory to write.", metavar="DIR")],
    revision: options.Revision = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Put a model into an ordinary Hugging Face directory."""
    from care_mla.checkpoint import at_revision

    name = at_revision(name, revision)
    with console(stderr=True).status(Text(f"Fetching {name} ...")):
        care_mla.fetch(name, directory, overwrite=overwrite)
    say(f"{name} is in {directory}")
    options.show_next(f"care inspect {quoted(directory)}")
