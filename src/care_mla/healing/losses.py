"""Distillation losses, pure functions of logits. All are sums over tokens, in nats.

Source: CARE Sec. 3.4, Eq. 6-8: L = CE + beta tau^2 KL(teacher || student).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import nll_loss

from care_mla.config import HealSettings
from care_mla.errors import ConfigError
from care_mla.runtime import has_float64

IGNORED = -100
"""Label of a position that predicts nothing: the last of a document or of a block."""
CHUNK = 128
"""Tokens whose logits are worked on at a time: a few of them stay in the processor's cache."""


@dataclass(frozen=True)
class TopTarget:
    """The teacher's first k tokens at every position; all others are one class.

    Attributes:
        log_probabilities: [tokens, k] float32, at the temperature of the loss.
        ids: [tokens, k].
    """

    log_probabilities: Tensor
    ids: Tensor

    def __getitem__(self, rows: slice) -> TopTarget:
        return TopTarget(self.log_probabilities[rows], self.ids[rows])


def next_tokens(input_ids: Int[Tensor, "batch tokens"], positions: Int[Tensor, "batch tokens"]) -> Tensor:
    """Labels [batch, tokens] of packed documents: what follows in the same document, else `IGNORED`.

    Args:
        positions: of each token in its document; 0 begins one.
    """
    labels = torch.full_like(input_ids, IGNORED)
    continues = positions[:, 1:] != 0
    labels[:, :-1] = torch.where(continues, input_ids[:, 1:], labels[:, :-1])
    return labels


def top_target(logits: Float[Tensor, "tokens V"], count: int, temperature: float = 1.0) -> TopTarget:
    """The `count` most likely tokens of a teacher."""
    scaled = logits / temperature
    values, ids = scaled.topk(min(count, logits.shape[-1]), dim=-1)
    return TopTarget(values - scaled.logsumexp(-1, keepdim=True), ids)


def cross_entropy(
    logits: Float[Tensor, "tokens V"], labels: Int[Tensor, "tokens"]
) -> tuple[Float[Tensor, ""], Float[Tensor, "tokens V"]]:
    """CE of Eq. 6 over labelled tokens, and its gradient at the logits: softmax minus one-hot."""
    log_probabilities = logits.log_softmax(-1)
    loss = nll_loss(log_probabilities, labels, ignore_index=IGNORED, reduction="sum")
    counted = labels != IGNORED
    gradient = log_probabilities.exp_().mul_(counted[:, None])
    gradient[counted, labels[counted]] -= 1.0
    return loss, gradient


def distillation(
    logits: Float[Tensor, "tokens V"], teacher: Tensor | TopTarget, temperature: float = 1.0
) -> tuple[Float[Tensor, ""], Float[Tensor, "tokens V"]]:
    """tau^2 KL(teacher || student) of Eq. 7-8, and its gradient at the student's logits.

    With a `TopTarget` it is the KL between distributions over the teacher's first k tokens and one class of all others: a
    lower bound of the whole, equal to it at k = V.

    Args:
        teacher: its logits, or its first tokens.
    """
    scaled = logits / temperature
    q_log = scaled - scaled.logsumexp(-1, keepdim=True)
    if isinstance(teacher, Tensor):
        p_log = (teacher / temperature).log_softmax(-1)
        p = p_log.exp()
        loss = (p * (p_log - q_log)).sum()
        return temperature**2 * loss, q_log.exp_().sub_(p).mul_(temperature)
    p_log, ids = teacher.log_probabilities, teacher.ids
    q_log_top, p_top = q_log.gather(-1, ids), p_log.exp()
    loss = (p_top * (p_log - q_log_top)).sum()
    gradient = q_log.exp_()
    if ids.shape[-1] < logits.shape[-1]:
        p_rest, q_rest = _remaining(p_log), _remaining(q_log_top)
        loss = loss + (p_rest * (p_rest.log() - q_rest.log())).sum()
        gradient = gradient.mul_(1.0 - (p_rest / q_rest)[:, None])
    gradient.scatter_(-1, ids, q_log_top.exp() - p_top)
    return temperature**2 * loss, gradient.mul_(temperature)


def _remaining(log_probabilities: Float[Tensor, "tokens k"]) -> Float[Tensor, "tokens"]:
    """Probability of all other classes, never zero."""
    return (1.0 - log_probabilities.exp().sum(-1)).clamp_min(1e-6)


class _Losses(torch.autograd.Function):
    """Both losses and their gradient, a few tokens at a time.

    Autograd would keep, and read again, five tensors of tokens x V in float32; written down, the gradient is the only one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        teacher: Tensor | TopTarget | None,
        weights: tuple[float, float],
        temperature: float,
        with_ce: bool,
    ) -> Tensor:
        kl_weight, ce_weight = weights
        precision = torch.float64 if has_float64(logits.device) else torch.float32
        sums = torch.zeros(2, dtype=precision, device=logits.device)
        gradient = torch.zeros_like(logits) if logits.requires_grad else None
        for start in range(0, len(logits), CHUNK):
            rows = slice(start, start + CHUNK)
            part, total = logits[rows].float(), None
            if teacher is not None:
                of_rows = teacher[rows]
                target = of_rows.float() if isinstance(of_rows, Tensor) else of_rows
                kl, kl_gradient = distillation(part, target, temperature)
                sums[0] += kl
                total = kl_gradient.mul_(kl_weight)
            if with_ce:
                ce, ce_gradient = cross_entropy(part, labels[rows])
                sums[1] += ce
                if ce_weight:
                    ce_gradient.mul_(ce_weight)
                    total = ce_gradient if total is None else total.add_(ce_gradient)
            if gradient is not None and total is not None:
                gradient[rows] = total.to(gradient.dtype)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return torch.stack([kl_weight * sums[0] + ce_weight * sums[1], *sums]).float()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0][0].to(gradient.dtype), None, None, None, None, None


def losses(
    logits: Float[Tensor, "tokens V"],
    labels: Int[Tensor, "tokens"],
    teacher: Tensor | TopTarget | None,
    *,
    kl_weight: float,
    ce_weight: float,
    temperature: float,
    with_ce: bool = False,
) -> Float[Tensor, "3"]:
    """beta tau^2 KL + w CE, which alone has a gradient, then the two by themselves.

    Args:
        teacher: its logits or first tokens; None counts no KL.
        with_ce: compute the cross entropy even where its weight is 0.
    """
    weights = (kl_weight, ce_weight)
    result: Tensor = _Losses.apply(logits, labels, teacher, weights, temperature, with_ce or bool(ce_weight))
    return result


def require_loss(settings: HealSettings) -> None:
    """
    Raises:
        ConfigError: nothing would be learned.
    """
    if not settings.kl_weight and not settings.ce_weight:
        raise ConfigError("--kl-weight and --ce-weight are both 0: nothing would be learned")
