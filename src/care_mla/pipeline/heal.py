"""`care heal`: a converted model and its teacher become a trained checkpoint, a record and a report."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from care_mla.checkpoint import Kind, claim, require_output
from care_mla.checkpoint.outputs import Claim
from care_mla.config import HealSettings
from care_mla.healing.unfinished import Start, UnfinishedRun
from care_mla.pipeline.inputs import inputs_of
from care_mla.pipeline.report import draw_report, saved_evaluations
from care_mla.progress import MeterFactory, Track, silent
from care_mla.records.artifacts import MANIFEST

if TYPE_CHECKING:
    from accelerate import Accelerator

    from care_mla.healing.pair import Pair


def heal(
    model: str | Path,
    out: str | Path,
    *,
    teacher: str | Path | None = None,
    teacher_logits: str | Path | None = None,
    log_with: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str | int | torch.device | None = None,
    name: str | None = None,
    track: Track = silent,
    meter: MeterFactory | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Train a converted or exported model toward its teacher.

    Started by `torchrun` or `accelerate launch`, all processes train together; what is written does not depend on their number.

    Args:
        model: directory that `convert` or `export` wrote.
        out: directory of the healed model; appears whole or not at all. Until then, `OUT.healing` holds what --resume needs.
        teacher: model directory or hub id; None: the source that the model was converted from.
        teacher_logits: directory in which `teacher_top_k` probabilities stay for other runs on the same text; None: `OUT.healing`.
        log_with: a tracker that accelerate knows ("tensorboard", "trackio", ...), beside the lines of `care_heal.jsonl`.
        resume: go on from the state in `OUT.healing`, with the settings that the run was started with.
        device: see `runtime.resolve_device`; several processes have an accelerator each.
        name: how the record calls the model; None: its path.
        settings: fields of `HealSettings`.

    Returns:
        The record of the run, as saved in `out`; see `records.healing.HealingRecord`.

    Raises:
        ConversionError: nothing is left at `out` then; the state for --resume stays.
    """
    from care_mla.healing.losses import require_loss
    from care_mla.healing.pair import open_pair
    from care_mla.healing.processes import make_accelerator, on_main, require_even_shares

    out = Path(out)
    unfinished = UnfinishedRun(out)
    inputs = inputs_of(source=model, teacher=teacher, text=settings.get("data"))
    require_output(out, Kind.HEALED, inputs, overwrite=overwrite)
    unfinished.require_apart(inputs)
    before = unfinished.to_resume() if resume else None
    chosen: HealSettings = HealSettings.make(**{**(before.settings if before else {}), **settings})
    require_loss(chosen)
    accelerator = make_accelerator(device, log_with, out.with_name(f"{out.name}.logs"))
    pair = open_pair(model, before.teacher_name if before and not teacher else teacher, name)
    require_even_shares(chosen.batch_size, accelerator)
    inputs += inputs_of(source=pair.directory, teacher=pair.teacher.directory)
    if not accelerator.is_main_process:
        track, meter = silent, None
    start = Start.of(pair, chosen)
    with ExitStack() as held:
        claimed = on_main(lambda: held.enter_context(claim(out, Kind.HEALED, inputs, overwrite=overwrite, shared=True)))
        on_main(lambda: unfinished.go_on(start) if resume else unfinished.begin(start, overwrite=overwrite))
        return heal_pair(
            pair,
            chosen,
            accelerator,
            unfinished,
            claimed,
            resume=resume,
            teacher_logits=teacher_logits,
            log_with=log_with,
            track=track,
            meter=meter,
        )


def heal_pair(
    pair: Pair,
    settings: HealSettings,
    accelerator: Accelerator,
    unfinished: UnfinishedRun,
    claimed: Claim | None,
    *,
    resume: bool,
    track: Track,
    meter: MeterFactory | None,
    teacher_logits: str | Path | None = None,
    log_with: str | None = None,
) -> dict[str, Any]:
    """Train, write, and remove the state of the run; returns its record.

    Args:
        unfinished: begun, or to go on with where `resume`.
        claimed: the output, on the main process.
        teacher_logits, log_with, track, meter: as of `heal`.
    """
    from care_mla.healing.processes import on_main
    from care_mla.healing.record import make_record
    from care_mla.healing.training import train
    from care_mla.healing.writing import write_healed

    training = train(
        pair,
        settings,
        accelerator,
        unfinished,
        resume=resume,
        teacher_logits=teacher_logits,
        log_with=log_with,
        track=track,
        meter=meter,
    )
    weights = training.weights()
    record = make_record(training, weights, saved_evaluations(pair.directory))

    def write() -> None:
        assert claimed is not None
        with claimed.staging(pair.reader.num_bytes) as staging:
            write_healed(staging, pair, weights, record, metrics=unfinished.metrics)
            if (staging / MANIFEST).is_file():
                draw_report(staging)
        unfinished.remove()

    on_main(write)
    accelerator.wait_for_everyone()  # a process that leaves early takes the connections of the others with it
    accelerator.end_training()  # and with it the process group
    return record.to_dict()
