"""The record of a run that is done."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from care_mla.healing.training import Training
from care_mla.records.artifacts import versions
from care_mla.records.healing import HealedModel, HealingRecord, Teacher, TextSizes, TrainedWeights


def make_record(
    training: Training, weights: dict[str, Tensor], evaluations_before: list[dict[str, Any]]
) -> HealingRecord:
    """What a run did and what it gave.

    Args:
        weights: what was trained.
        evaluations_before: what `care evaluate` had found of the model.
    """
    pair, run = training.pair, training.run
    progress = run.progress
    return HealingRecord(
        settings=run.settings.model_dump(mode="json"),
        lr=run.lr,
        model=HealedModel(pair.name, pair.reader.fingerprint),
        teacher=Teacher(pair.teacher_name, pair.teacher.fingerprint, training.shares_weights),
        evaluations_before=evaluations_before,
        text=TextSizes(run.train.num_tokens, run.held_out.num_tokens),
        trained=TrainedWeights(len(training.trained), sum(tensor.numel() for tensor in weights.values())),
        processes=run.accelerator.num_processes,
        step=progress.step,
        tokens=progress.tokens,
        skipped=progress.skipped,
        seconds=progress.seconds,
        best_step=progress.best_step,
        evaluations=progress.evaluations,
        stopped_early=progress.step < run.steps,
        tokens_per_second=progress.tokens / max(progress.seconds, 1e-9),
        one_shot=progress.evaluations[0],
        healed=next(each for each in progress.evaluations if each.step == progress.best_step),
        versions=versions(),
    )
