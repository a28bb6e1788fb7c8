"""care calibrate"""

from __future__ import annotations

from typing import Annotated

import typer

from care_mla import pipeline
from care_mla.checkpoint import at_revision
from care_mla.cli import options
from care_mla.cli.application import app
from care_mla.cli.terminal import say
from care_mla.progress import rich_track
from care_mla.stats import StatisticsStore


@app.command()
def calibrate(
    source: options.Source,
    out: options.Out,
    revision: options.Revision = None,
    calibration: options.Calibration = None,
    field: options.Field = None,
    samples: options.Samples = None,
    seqlen: options.Seqlen = None,
    seed: options.Seed = None,
    batch_size: options.BatchSize = None,
    pack: options.Pack = None,
    inputs: Annotated[
        bool | None,
        typer.Option("--inputs", help="Also collect D x D input moments, for method care_c and --q-lora-rank."),
    ] = None,
    normalized: Annotated[
        bool | None,
        typer.Option("--normalized", help="Also collect normalized queries and keys, for --qk-norm linear."),
    ] = None,
    fisher: Annotated[
        bool | None,
        typer.Option("--fisher", help="Also run a backward pass and collect Fisher statistics, for method fisher."),
    ] = None,
    device: options.Device = None,
    dtype: options.DType = "auto",
    overwrite: options.Overwrite = False,
) -> None:
    """Collect statistics once; they serve every method and rank."""
    source = at_revision(source, revision)
    settings = options.given(
        calibration=calibration,
        field=field,
        samples=samples,
        seqlen=seqlen,
        seed=seed,
        batch_size=batch_size,
        pack=pack,
        inputs=inputs,
        normalized=normalized,
        fisher=fisher,
    )
    pipeline.calibrate(source, out, overwrite=overwrite, device=device, dtype=dtype, track=rich_track, **settings)
    say(f"statistics are in {out}")
    options.show_notes(StatisticsStore(out).notes)
