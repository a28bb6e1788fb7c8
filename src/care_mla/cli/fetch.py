"""care fetch"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich import print as show

from care_mla import pipeline
from care_mla.cli import app, options


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="smollm2-135m, a .gguf file, or a hub id.", metavar="NAME")],
    directory: Annotated[Path, typer.Argument(help="Directory to write.", metavar="DIR")],
    overwrite: options.Overwrite = False,
) -> None:
    """Put a model into an ordinary Hugging Face directory."""
    from rich.console import Console

    with Console().status(f"Fetching {name} ..."):
        pipeline.fetch(name, directory, overwrite=overwrite)
    show(f"{name} is in {directory}")
