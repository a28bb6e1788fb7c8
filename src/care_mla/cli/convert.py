"""care convert"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import care_mla
from care_mla.cli import options
from care_mla.cli.adapter import count_of, options_from
from care_mla.cli.application import app
from care_mla.cli.tables import show_conversion, show_healing
from care_mla.cli.terminal import quoted
from care_mla.config import Recipe, TextSettings
from care_mla.config.base import TRAINING_PANEL


@app.command(
    epilog=options.examples(
        "care convert MODEL --kv-save 0.5 --out OUT",
        "care convert MODEL --kv-save 0.75 --calibration alpaca --heal-tokens 0.25M --out OUT",
        "care convert MODEL --recipe OUT/care_manifest.json --out AGAIN",
    )
)
@options_from(recipe=Recipe, calibration=TextSettings)
def convert(
    source: options.Source,
    out: options.Out,
    stats: Annotated[
        Path | None,
        typer.Option("--stats", help="Statistics of `care calibrate`.", show_default="calibrate now", metavar="DIR"),
    ] = None,
    heal_tokens: Annotated[
        int | None,
        typer.Option(
            "--heal-tokens",
            help="Then train the converted model back toward the source on so many tokens, e.g. 64k: `care heal` with its defaults.",
            parser=lambda text: count_of(str(text), "--heal-tokens"),
            metavar="TOKENS",
            show_default="no healing",
        ),
    ] = None,
    heal_data: Annotated[
        str | None,
        typer.Option(
            "--heal-data",
            help="Text to heal on.",
            show_default="the calibration's",
            metavar="SPEC",
            rich_help_panel=TRAINING_PANEL,
        ),
    ] = None,
    revision: options.Revision = None,
    device: options.Device = None,
    overwrite: options.Overwrite = False,
    *,
    settings: dict[str, dict[str, Any]],
) -> None:
    """Convert a checkpoint; writes a loadable model, its manifest and a report."""
    from care_mla.checkpoint import at_revision
    from care_mla.progress import rich_meter, rich_track

    source = at_revision(source, revision)
    how: dict[str, Any] = {
        "stats": stats,
        "calibration": settings["calibration"],
        "overwrite": overwrite,
        "device": device,
        "track": rich_track,
        **settings["recipe"],
    }
    if heal_tokens is None:
        if heal_data is not None:
            raise typer.BadParameter("--heal-data needs --heal-tokens")
        manifest = care_mla.convert(source, out, **how)
    else:
        from care_mla.pipeline import kept_after_interrupt

        with options.interruptible(lambda: kept_after_interrupt(out)):
            manifest = care_mla.convert_and_heal(
                source, out, heal_tokens=heal_tokens, heal_data=heal_data, meter=rich_meter, **how
            )
    show_conversion(manifest, out)
    for record in manifest.get("healing", []):
        show_healing(record, out)
    options.show_next(f"care evaluate {quoted(out)} --reference {quoted(source)} --text TEXT")
