"""One module that holds student and teacher and returns losses: what is wrapped for several processes, and called in a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from care_mla.config import HealSettings
from care_mla.healing.blocks import packed_inputs
from care_mla.healing.losses import CHUNK, TopTarget, losses, next_tokens, top_target
from care_mla.healing.student import Pupil, Runs

LOSSES = ("loss", "kl", "ce", "teacher_ce")
"""What a pass returns, as sums over tokens; `loss` alone has a gradient, and what a pass does not compute is zero."""


class Distillation(nn.Module):
    """Student, teacher and loss (CARE Eq. 6-8).

    Args:
        teacher: a model of its own; None where the student's model holds the teacher's attentions.
    """

    def __init__(self, pupil: Pupil, teacher: PreTrainedModel | None, settings: HealSettings):
        super().__init__()
        self.model = pupil.model
        self.teacher = teacher
        self.pupil, self.settings = pupil, settings

    def forward(
        self, input_ids: Tensor, positions: Tensor, top: Tensor | None, ids: Tensor | None, evaluating: bool
    ) -> Tensor:
        """Losses of [batch, tokens] packed tokens as a vector in the order of `LOSSES`.

        Args:
            top, ids: [batch, tokens, k], the teacher's stored probabilities; None runs it.
            evaluating: compute all of `LOSSES`.
        """
        settings, labels = self.settings, next_tokens(input_ids, positions).flatten()
        target: Tensor | TopTarget | None = None
        if top is not None and ids is not None:
            target = TopTarget(top.flatten(0, 1), ids.flatten(0, 1))
        elif settings.kl_weight or evaluating:
            target = self.teacher_logits(input_ids, positions)
        logits = self.student_logits(input_ids, positions)
        weights = {name: getattr(settings, name) for name in ("kl_weight", "ce_weight", "temperature")}
        result = losses(logits, labels, target, with_ce=evaluating, **weights)
        teacher_ce = result.new_zeros(1)
        if evaluating and isinstance(target, Tensor):
            teacher_ce = losses(target, labels, None, with_ce=True, **weights)[2:]
        return torch.cat([result, teacher_ce])

    def student_logits(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """[batch * tokens, V]."""
        with self._running("student"):
            logits: Tensor = self.model(**self._inputs(input_ids, positions)).logits
        return logits.flatten(0, 1)

    @torch.no_grad()
    def teacher_logits(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """[batch * tokens, V]."""
        model = self.model if self.teacher is None else self.teacher
        with self._running("teacher"):
            logits: Tensor = model(**self._inputs(input_ids, positions)).logits
        return logits.flatten(0, 1)

    def teacher_top(self, input_ids: Tensor, positions: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The teacher's first `count` log-probabilities and their ids, [batch, tokens, count]."""
        logits = self.teacher_logits(input_ids, positions)
        tops = [top_target(part.float(), count, self.settings.temperature) for part in logits.split(CHUNK)]
        shape = (*input_ids.shape, -1)
        return torch.cat([t.log_probabilities for t in tops]).view(shape), torch.cat([t.ids for t in tops]).view(shape)

    @contextmanager
    def _running(self, runs: Runs) -> Iterator[None]:
        switch = self.pupil.switch
        if switch is not None:
            switch.runs = runs
        yield
        if switch is not None:
            switch.runs = "student"  # layers that are recomputed in the backward pass are the student's

    def _inputs(self, input_ids: Tensor, positions: Tensor) -> dict[str, Any]:
        return packed_inputs(self.model, self.pupil.family, input_ids, positions)
