"""care export"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import care_mla
from care_mla.cli import options
from care_mla.cli.adapter import options_from
from care_mla.cli.application import app
from care_mla.cli.tables import show_export
from care_mla.cli.terminal import quoted
from care_mla.config import ExportSettings


@app.command(
    epilog=options.examples(
        "care convert MODEL --layout mla --rope stock --no-centre --kv-save 0.5 --out OUT",
        "care export OUT --out DEEPSEEK",
    )
)
@options_from(settings=ExportSettings)
def export(
    converted: Annotated[
        Path, typer.Argument(help="What `care convert --layout mla --rope stock` wrote.", metavar="DIR")
    ],
    out: options.Out,
    overwrite: options.Overwrite = False,
    *,
    settings: dict[str, dict[str, Any]],
) -> None:
    """Write a converted model as a checkpoint of a stock class: loads with no custom code."""
    from care_mla.progress import rich_track

    record = care_mla.export(converted, out, overwrite=overwrite, track=rich_track, **settings["settings"])
    show_export(record, converted, out)
    engine = record["engine"] if "engine" in record else settings["settings"].get("engine", "transformers")
    options.show_next(f"vllm serve {quoted(out)}" if engine == "vllm" else f"care evaluate {quoted(out)} --text TEXT")
