"""care eval"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from care_mla import pipeline
from care_mla.checkpoint import at_revision
from care_mla.cli import options
from care_mla.cli.application import app
from care_mla.cli.terminal import console
from care_mla.progress import rich_track


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Converted model, or any model.", metavar="DIR")],
    text: Annotated[str, typer.Option("--text", help="Text file, records file, or named corpus.")],
    seqlen: Annotated[int, typer.Option("--seqlen", help="Tokens in a window.")] = 512,
    windows: Annotated[int, typer.Option("--windows", help="Windows from the beginning of the text.")] = 8,
    revision: options.Revision = None,
    reference: Annotated[
        str | None, typer.Option("--reference", help="The unconverted model; of a hub id NAME@REVISION, too.")
    ] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the numbers here too.")] = None,
    field: options.Field = None,
    device: options.Device = None,
    dtype: options.DType = "auto",
) -> None:
    """Perplexity, KL to the reference, and the cache measured on the live cache object."""
    options.require_json(json_out)
    result = pipeline.evaluate(
        at_revision(model, revision),
        text,
        reference=reference,
        seqlen=seqlen,
        windows=windows,
        field=field,
        device=device,
        dtype=dtype,
        track=rich_track,
    )
    if json_out is not None:
        pipeline.write_json(json_out, {"format": "care-mla evaluation 1", **result})
    ran = f"{result['dtype']} on {result['device']}"
    console().print(evaluation_table(result, title=f"{model} on {text}, {windows} x {seqlen} tokens, {ran}"))
    options.show_notes(result["notes"])


def evaluation_table(result: dict[str, Any], *, title: str) -> Table:
    """Model and reference side by side."""
    table = Table(title=title)
    table.add_column("")
    table.add_column("converted" if result["reference_loss"] is not None else "model", justify="right")
    reference = result["reference_cache"]
    if reference is not None:
        table.add_column("original", justify="right")
    rows = [
        ("perplexity", f"{result['perplexity']:.3f}", f"{result['reference_perplexity'] or 0:.3f}"),
        ("loss, nats per token", f"{result['loss']:.4f}", f"{result['reference_loss'] or 0:.4f}"),
        (
            "cache elements per token",
            f"{result['cache']['elements_per_token']:.0f}",
            f"{reference['elements_per_token']:.0f}" if reference else "",
        ),
        (
            "cache bytes per token, measured",
            f"{result['cache']['bytes_per_token']:.0f}",
            f"{reference['bytes_per_token']:.0f}" if reference else "",
        ),
    ]
    for name, mine, theirs in rows:
        table.add_row(name, mine, *([theirs] if reference is not None else []))
    if reference is not None:
        table.add_section()
        table.add_row("loss increase, nats per token", f"{result['loss_increase']:+.4f}", "")
        table.add_row("KL(original || converted), nats", f"{result['kl']:.4f}", "")
        table.add_row("top-1 agreement", f"{100 * result['top1_agreement']:.1f}%", "")
    return table
