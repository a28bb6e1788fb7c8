"""Partial RoPE as a selection problem: which (frequency, component) pairs of the keys stay rotary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from care_mla.errors import RankError
from care_mla.linalg import symmetric_eigen
from care_mla.names import RopeMode
from care_mla.rope.complex import complex_moment, real_map
from care_mla.rope.turning import distance_weights


@dataclass(frozen=True)
class Components:
    """Principal components of the keys of every fold of adjacent frequencies (FreqFold; mostly one frequency each), k = M g.

    Attributes:
        energies: [folds, k], descending: what dropping a component costs under the metric.
        encoder: [folds, k, k]; row c reads component c out of z (w = A z).
        decoder: [folds, k, k]; column c writes it back (z = B w). B A = I.
    """

    energies: Float[Tensor, "folds k"]
    encoder: Complex[Tensor, "folds k k"]
    decoder: Complex[Tensor, "folds k k"]


@dataclass(frozen=True)
class RotarySelection:
    """What stays rotary in one layer.

    Attributes:
        frequencies: [P] index into the source's frequencies at which every rotary pair turns.
        sources: [P, M] index of the frequencies that a pair is mixed of; M = 1 and the same, but for FreqFold.
        encoder: [P, M, g] reads the shared rotary key out of z of those frequencies.
        decoder: [P, M, g] writes it back: a query of head group h meets pair p as sum_m conj(decoder[p, m, h]) q_m.
        rest: [n, n] real; the position-free part of the stacked keys is rest @ k.
    """

    frequencies: Int[Tensor, "P"]
    sources: Int[Tensor, "P M"]
    encoder: Complex[Tensor, "P M g"]
    decoder: Complex[Tensor, "P M g"]
    rest: Float[Tensor, "n n"]


def components(
    second_moment: Complex[Tensor, "folds k k"],
    metric: Complex[Tensor, "folds k k"] | None = None,
    shrinkage: float = 0.02,
) -> Components:
    """Eigenpairs of G^{1/2} M G^{1/2} fold by fold; the metric is shrunk toward its mean.

    Any complex mix over the heads commutes with RoPE, so the basis may be chosen freely; TransMLA's real one is a special
    case (`transmla`: pass the real part).
    """
    if metric is None:
        energies, vectors = symmetric_eigen(second_moment, name="the moment of the rotary keys")
        energies, vectors = energies.flip(-1).clamp_min(0.0), vectors.flip(-1)
        return Components(energies, vectors.mH, vectors)
    mean = metric.diagonal(dim1=-2, dim2=-1).real.mean(-1)
    damped = (1.0 - shrinkage) * metric + shrinkage * torch.diag_embed(mean[:, None].expand(metric.shape[:2]))
    values, basis = symmetric_eigen(damped, name="the metric of the rotary keys")
    half = (basis * values.sqrt()[:, None, :]) @ basis.mH
    inverse = (basis * values.rsqrt()[:, None, :]) @ basis.mH
    energies, vectors = symmetric_eigen(half @ second_moment @ half, name="the moment of the rotary keys")
    energies, vectors = energies.flip(-1).clamp_min(0.0), vectors.flip(-1)
    return Components(energies, vectors.mH @ half, inverse @ vectors)


def dropped_rotation(frequencies: Float[Tensor, "F"], context: int) -> Float[Tensor, "F"]:
    """E|exp(i D theta) - 1|^2 over the distances D between two positions of a context: what standing still costs.

    Pairs of positions are uniform, so D has weight context - D. A frequency that hardly turns within the context costs
    nothing; one that turns many times costs 2.
    """
    distance, weight = torch.arange(context, dtype=torch.float64), distance_weights(context)
    still = (weight * torch.cos(frequencies.double()[:, None] * distance)).sum(1)
    return (2.0 - 2.0 * still).clamp_min(0.0)


def select(
    parts: Components, cost: Float[Tensor, "F"], num_pairs: int, num_kv_heads: int, mode: RopeMode = "free"
) -> RotarySelection:
    """Choose the pairs that stay rotary.

    Args:
        parts: from `components`.
        cost: [F] relative cost of not rotating a frequency, see `dropped_rotation`.
        num_pairs: P = qk_rope_head_dim / 2.
        mode: `free` keeps the pairs of largest energy x cost, whatever their frequencies; `stock` and `transmla` keep the
            first components of every fold, turned at every (F / P)-th frequency, which is what an engine generates from
            rope_theta. With folds of several frequencies that is an approximation, TransMLA's FreqFold.

    Raises:
        RankError: more pairs than there are, or a number that does not divide the frequencies or leaves a fold without one.
    """
    (folds, width), num_frequencies = parts.energies.shape, len(cost)
    fold = num_frequencies // folds
    kept = torch.zeros(folds, width, dtype=torch.bool)
    if mode == "free":
        price = parts.energies * cost[:, None]
        if not 0 <= num_pairs <= price.numel():
            raise RankError(f"--qk-rope-head-dim {2 * num_pairs} is outside 0..{2 * price.numel()} (all keys rotary)")
        kept.view(-1)[price.flatten().argsort(descending=True, stable=True)[:num_pairs]] = True
        frequencies = kept.nonzero()[:, 0]
    else:
        if num_pairs < 1 or num_frequencies % num_pairs:
            raise RankError(
                f"--qk-rope-head-dim {2 * num_pairs}: stock frequencies need a divisor of the head width {2 * num_frequencies}"
            )
        step = num_frequencies // num_pairs
        if fold > 1 and fold % step:
            raise RankError(
                f"--freq-fold {fold} must be a multiple of {step}: a fold without a rotary pair would stand still"
            )
        first = torch.arange(0, num_frequencies, step)
        kept[first // fold, first % fold // step] = True
        frequencies = first
    dropped = torch.diag_embed((~kept).to(parts.encoder.dtype))
    index, component = kept.nonzero().unbind(1)
    return RotarySelection(
        frequencies=frequencies,
        sources=index[:, None] * fold + torch.arange(fold),
        encoder=parts.encoder[index, component].view(-1, fold, num_kv_heads),
        decoder=parts.decoder[index, :, component].view(-1, fold, num_kv_heads),
        rest=real_map(parts.decoder @ dropped @ parts.encoder, num_kv_heads),
    )


def predicted_rotation_loss(
    selection: RotarySelection,
    cost: Float[Tensor, "F"],
    curvature: Float[Tensor, "n n"],
    second_moment: Float[Tensor, "n n"],
) -> float:
    """Loss increase of dropping the rotations of one layer, in nats per token, to second order.

    A component w that stands still where it should turn by an angle is off by w (exp(i angle) - 1); angles of a context are
    taken as independent of the gradient's phase, which halves E[Re(conj(g) e)^2] to E|g|^2 E|e|^2 / 2. What FreqFold turns at a
    neighbouring frequency is not counted.

    Args:
        cost: from `dropped_rotation`.
        curvature, second_moment: H (`FisherMoments.curvature`) and M of the keys.
    """
    head_dim = 2 * len(cost)
    lost = selection.rest @ second_moment @ selection.rest.T
    H, E = complex_moment(curvature, head_dim), complex_moment(lost, head_dim)
    return 0.25 * float((torch.einsum("fab,fba->f", H, E).real * cost).sum())
