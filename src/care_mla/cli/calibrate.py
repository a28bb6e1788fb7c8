"""care calibrate"""

from __future__ import annotations

from typing import Any

import care_mla
from care_mla.cli import options
from care_mla.cli.adapter import options_from
from care_mla.cli.application import app
from care_mla.cli.terminal import quoted, say
from care_mla.config import CalibrationSettings


@app.command(
    epilog=options.examples(
        "care calibrate MODEL --out stats --calibration alpaca",
        "care calibrate MODEL --out stats --calibration notes.txt --samples 256",
    )
)
@options_from(settings=CalibrationSettings)
def calibrate(
    source: options.Source,
    out: options.Out,
    revision: options.Revision = None,
    device: options.Device = None,
    dtype: options.DType = "auto",
    overwrite: options.Overwrite = False,
    *,
    settings: dict[str, dict[str, Any]],
) -> None:
    """Collect statistics once; they serve every method, layout and budget."""
    from care_mla.checkpoint import at_revision
    from care_mla.progress import rich_track
    from care_mla.stats import StatisticsStore

    source = at_revision(source, revision)
    care_mla.calibrate(
        source, out, overwrite=overwrite, device=device, dtype=dtype, track=rich_track, **settings["settings"]
    )
    say(f"statistics are in {out}")
    options.show_notes(StatisticsStore(out).notes)
    where = f"{quoted(source)} --stats {quoted(out)}"
    options.show_next(f"care plan {where}", f"care convert {where} --kv-save 0.5 --out OUT")
