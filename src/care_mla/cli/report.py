"""care report"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich import print as show

from care_mla import pipeline
from care_mla.cli import app


@app.command()
def report(directory: Annotated[Path, typer.Argument(help="Converted model.", metavar="DIR")]) -> None:
    """Write the HTML report again from the saved artifacts."""
    show(f"report is at {pipeline.write_report(directory)}")
