"""care heal"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import care_mla
from care_mla.cli import options
from care_mla.cli.adapter import options_from
from care_mla.cli.application import app
from care_mla.cli.tables import show_healing
from care_mla.cli.terminal import quoted
from care_mla.config import HealSettings
from care_mla.config.base import RUN_PANEL


@app.command(
    epilog=options.examples(
        "care heal CONVERTED --tokens 0.25M --data alpaca --out HEALED",
        "care heal CONVERTED --out HEALED --resume",
        "torchrun --nproc-per-node 8 $(which care) heal CONVERTED --tokens 20M --data c4 --shard --out HEALED",
    )
)
@options_from(settings=HealSettings)
def heal(
    model: Annotated[str, typer.Argument(help="Directory of `care convert` or `care export`.", metavar="DIR")],
    out: options.Out,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last saved state in OUT.healing.")] = False,
    teacher: Annotated[
        str | None,
        typer.Option(
            "--teacher",
            help="Model directory or hub id.",
            show_default="what the model was converted from",
            metavar="NAME",
            rich_help_panel=RUN_PANEL,
        ),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(
            "--revision",
            help="Branch, tag or commit of --teacher; as good as NAME@REVISION.",
            show_default="main",
            metavar="NAME",
            rich_help_panel=RUN_PANEL,
        ),
    ] = None,
    teacher_logits: Annotated[
        Path | None,
        typer.Option(
            "--teacher-logits",
            help="Where the teacher's probabilities stay, for other runs on the same text.",
            show_default="not kept",
            metavar="DIR",
            rich_help_panel=RUN_PANEL,
        ),
    ] = None,
    log_with: Annotated[
        str | None,
        typer.Option(
            "--log-with",
            help="Also log to tensorboard, trackio or another tracker that accelerate knows.",
            show_default="none",
            metavar="NAME",
            rich_help_panel=RUN_PANEL,
        ),
    ] = None,
    device: options.Device = None,
    overwrite: options.Overwrite = False,
    *,
    settings: dict[str, dict[str, Any]],
) -> None:
    """Train a converted model back toward its source; under torchrun or accelerate launch, all processes together."""
    from care_mla.checkpoint import at_revision
    from care_mla.pipeline import kept_after_interrupt
    from care_mla.progress import rich_meter, rich_track

    if revision is not None and teacher is None:
        raise typer.BadParameter("--revision is of a teacher on the hub; name it with --teacher")
    with options.interruptible(lambda: kept_after_interrupt(out)):
        record = care_mla.heal(
            model,
            out,
            teacher=at_revision(teacher, revision) if teacher is not None else None,
            teacher_logits=teacher_logits,
            log_with=log_with,
            resume=resume,
            overwrite=overwrite,
            device=device,
            track=rich_track,
            meter=rich_meter,
            **settings["settings"],
        )
    if options.is_main_process():
        show_healing(record, out)
        options.show_next(f"care evaluate {quoted(out)} --text TEXT")
