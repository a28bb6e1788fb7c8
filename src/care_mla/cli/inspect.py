"""care inspect"""

from __future__ import annotations

from typing import Annotated

import typer

import care_mla
from care_mla.cli import options
from care_mla.cli.adapter import options_from
from care_mla.cli.application import app
from care_mla.cli.tables import show_inspection
from care_mla.cli.terminal import quoted


@app.command(epilog=options.examples("care inspect MODEL", "care inspect Qwen/Qwen3-4B --budgets 0.5,0.75"))
@options_from()
def inspect(
    source: options.Source,
    budgets: Annotated[
        str, typer.Option("--budgets", help="Shares of the cache to save.", metavar="SHARES")
    ] = "0.5,0.75,0.875",
    batch: Annotated[
        int, typer.Option("--batch", help="Sequences that the cache in GiB holds.", metavar="N", min=1)
    ] = 1,
    revision: options.Revision = None,
) -> None:
    """Architecture, cache now and at the given budgets, what a conversion must keep, and what each engine can run. Reads config.json alone."""
    from care_mla.checkpoint import at_revision

    source = at_revision(source, revision)
    show_inspection(care_mla.inspect(source, options.numbers(budgets, "--budgets"), batch=batch), source)
    options.show_next(f"care convert {quoted(source)} --kv-save 0.5 --out OUT")
