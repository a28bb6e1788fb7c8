"""care inspect"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from care_mla import pipeline
from care_mla.checkpoint import at_revision
from care_mla.cli import options
from care_mla.cli.application import app
from care_mla.cli.terminal import console


@app.command()
def inspect(
    source: options.Source,
    revision: options.Revision = None,
    budgets: Annotated[str, typer.Option("--budgets", help="Shares of the cache to save.")] = "0.5,0.75,0.875",
) -> None:
    """Architecture, cache now and at the given budgets, and what a conversion must keep. Reads config.json alone."""
    source = at_revision(source, revision)
    facts = pipeline.inspect(source, options.numbers(budgets, "--budgets"))
    geometry = facts.geometry
    table = Table(title=f"{source}: {facts.architecture}", show_header=False)
    table.add_row(
        "attention",
        f"{geometry.attention_kind}, {geometry.num_heads} query heads over {geometry.num_kv_heads} key/value heads of {geometry.head_dim}",
    )
    table.add_row("layers, hidden size", f"{geometry.num_layers}, {geometry.hidden_size}")
    table.add_row("KV parity", f"rank {geometry.kv_width} for K and V, joint {2 * geometry.kv_width}")
    terminal = console()
    terminal.print(table)

    cache = Table(title=f"KV cache per token ({facts.dtype})")
    for column in ("saved", "elements", "bytes", "--rank", "joint latent"):
        cache.add_column(column, justify="right")
    for row in facts.budgets:
        cache.add_row(
            f"{100 * row.kv_save:.1f}%",
            str(row.elements),
            str(row.elements * facts.element_bytes),
            f"{row.rank:g}",
            f"{2 * row.rank:g}",
        )
    terminal.print(cache)

    kept = Table(title="Features a conversion must keep")
    for column in ("feature", "in this model", "layouts split, joint", "layout mla"):
        kept.add_column(column)
    for feature in facts.features:
        kept.add_row(*feature)
    terminal.print(kept if facts.features else "No feature beyond plain attention with RoPE; all layouts express it.")
