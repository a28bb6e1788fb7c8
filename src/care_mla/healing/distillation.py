"""One module that holds student and teacher and returns losses: what is wrapped for several processes, and called in a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from care_mla.config import HealSettings
from care_mla.errors import ConfigError
from care_mla.healing.blocks import packed_inputs
from care_mla.healing.losses import CHUNK, TopTarget, losses, next_tokens, relative_square_error, top_target
from care_mla.healing.student import Pupil, Runs

Phase = Literal["logits", "attention", "hidden", "evaluation"]
LOSSES = ("loss", "kl", "ce", "teacher_ce")
"""What a pass returns, as sums over tokens; `loss` alone has a gradient, and what a phase does not compute is zero."""


class Distillation(nn.Module):
    """Student, teacher and loss (CARE Eq. 6-8).

    Args:
        teacher: a model of its own; None where the student's model holds the teacher's attentions.

    Raises:
        ConfigError: hidden states are to be matched with a teacher of another depth or width.
    """

    def __init__(self, pupil: Pupil, teacher: PreTrainedModel | None, settings: HealSettings):
        super().__init__()
        self.model = pupil.model
        self.teacher = teacher
        self.pupil, self.settings = pupil, settings
        if teacher is not None and settings.layerwise == "hidden":
            layers = len(pupil.decoder_layers()), len(pupil.layers_of(teacher))
            widths = [model.config.get_text_config().hidden_size for model in (pupil.model, teacher)]
            if layers[0] != layers[1] or widths[0] != widths[1]:
                raise ConfigError(
                    f"--layerwise hidden needs a teacher of the model's depth and width: the model has {layers[0]} layers of {widths[0]}, the teacher "
                    f"{layers[1]} of {widths[1]}"
                )

    def forward(
        self, input_ids: Tensor, positions: Tensor, top: Tensor | None, ids: Tensor | None, phase: Phase
    ) -> Tensor:
        """Losses of [batch, tokens] packed tokens as a vector in the order of `LOSSES`.

        Args:
            top, ids: [batch, tokens, k], the teacher's stored probabilities; None runs it.
        """
        if phase in ("attention", "hidden"):
            matched = self._match_attentions if phase == "attention" else self._match_hidden_states
            loss = matched(input_ids, positions)
            return torch.stack([loss, *loss.new_zeros(len(LOSSES) - 1)])
        settings, labels = self.settings, next_tokens(input_ids, positions).flatten()
        evaluating = phase == "evaluation"
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

    def _decoder(self) -> nn.Module:
        inner = self.model.get_submodule(self.pupil.inner) if self.pupil.inner else self.model
        return inner.base_model

    def _match_attentions(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Every layer's attention output against the teacher's on the teacher's stream, mean over layers."""
        switch = self.pupil.switch
        assert switch is not None
        switch.errors = []
        with self._running("both"), torch.no_grad():
            self._decoder()(**self._inputs(input_ids, positions))
        return torch.stack(switch.errors).mean()

    def _match_hidden_states(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """The student's own stream against the teacher's after every layer, mean over layers."""
        with torch.no_grad():
            theirs = [self._stream_scale() * stream for stream in self._streams("teacher", input_ids, positions)]
        own = self._streams("student", input_ids, positions)
        return torch.stack([relative_square_error(a, b) for a, b in zip(own, theirs, strict=True)]).mean()

    def _streams(self, runs: Runs, input_ids: Tensor, positions: Tensor) -> list[Tensor]:
        """Hidden states after every decoder layer."""
        streams: list[Tensor] = []

        def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
            streams.append(output[0] if isinstance(output, tuple) else output)

        run, layers = self._decoder(), self.pupil.decoder_layers()
        logits: dict[str, int] = {}
        if runs == "teacher" and self.teacher is not None:
            run, layers = self.teacher, self.pupil.layers_of(self.teacher)
            logits = {"logits_to_keep": 1}  # the whole model, which is one unit where it is sharded
        handles = [layer.register_forward_hook(keep) for layer in layers]
        try:
            with self._running(runs):
                run(**self._inputs(input_ids, positions), **logits)
        finally:
            for handle in handles:
                handle.remove()
        return streams

    def _stream_scale(self) -> float:
        """The student's stream over the teacher's: an exported one is scaled to another eps (`mapping.deepseek`)."""
        if self.teacher is None or self.pupil.inner:
            return 1.0
        own, theirs = (model.config.get_text_config().rms_norm_eps for model in (self.model, self.teacher))
        return float((own / theirs) ** 0.5)
