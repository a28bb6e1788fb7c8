"""care report"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from care_mla import pipeline
from care_mla.cli.application import app
from care_mla.cli.terminal import say


@app.command()
def report(directory: Annotated[Path, typer.Argument(help="Converted model.", metavar="DIR")]) -> None:
    """Write the HTML report again from the saved artifacts."""
    say(f"report is at {pipeline.write_report(directory)}")
