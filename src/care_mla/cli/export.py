"""care export"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from care_mla import pipeline
from care_mla.cli import options
from care_mla.cli.application import app
from care_mla.cli.terminal import console
from care_mla.progress import rich_track


@app.command()
def export(
    converted: Annotated[
        Path, typer.Argument(help="What `care convert --layout mla --rope stock` wrote.", metavar="DIR")
    ],
    out: options.Out,
    target: Annotated[str, typer.Option("--target", help=f"{', '.join(pipeline.EXPORT_TARGETS)}.")] = "deepseek-v3",
    engine: Annotated[
        str,
        typer.Option("--engine", help="transformers: any latent width; vllm: latent + rotary key of 320, 512 or 576."),
    ] = "transformers",
    kv_lora_rank: Annotated[
        int | None,
        typer.Option("--kv-lora-rank", help="Pad all latents to this width.  [default: as little as possible]"),
    ] = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Write a converted model as a checkpoint of a stock class: loads with no custom code."""
    record = pipeline.export(
        converted, out, target=target, engine=engine, kv_lora_rank=kv_lora_rank, overwrite=overwrite, track=rich_track
    )
    table = Table(title=f"{converted} -> {out}", show_header=False)
    table.add_row("class", record["architecture"])
    table.add_row("cache of a layer", f"latent {record['kv_lora_rank']} + rotary key {record['qk_rope_head_dim']}")
    table.add_row("cached elements per token", f"{record['cache_elements_per_token']}")
    table.add_row("KV cache saved", f"{100 * record['kv_save']:.1f}%")
    console().print(table)
    options.show_notes(record["notes"])
