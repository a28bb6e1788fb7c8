"""care report"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import care_mla
from care_mla.cli import options
from care_mla.cli.adapter import options_from
from care_mla.cli.application import app
from care_mla.cli.terminal import say


@app.command(epilog=options.examples("care report OUT"))
@options_from()
def report(directory: Annotated[Path, typer.Argument(help="Converted model.", metavar="DIR")]) -> None:
    """Write the HTML report again from the saved records."""
    say(f"report is at {care_mla.write_report(directory)}")
