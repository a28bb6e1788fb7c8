"""care fetch"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from care_mla import pipeline
from care_mla.checkpoint import at_revision
from care_mla.cli import options
from care_mla.cli.application import app
from care_mla.cli.terminal import console, say


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="smollm2-135m, a .gguf file, or a hub id.", metavar="NAME")],
    directory: Annotated[Path, typer.Argument(help="Directory to write.", metavar="DIR")],
    revision: options.Revision = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Put a model into an ordinary Hugging Face directory."""
    name = at_revision(name, revision)
    with console(stderr=True).status(Text(f"Fetching {name} ...")):
        pipeline.fetch(name, directory, overwrite=overwrite)
    say(f"{name} is in {directory}")
