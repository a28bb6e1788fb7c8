"""Partial RoPE as a selection problem: which (frequency, component) pairs of the keys stay rotary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from care_mla.errors import RankError
from care_mla.rope.complex import complex_moment, real_map

RopeMode = Literal["free", "stock", "transmla"]


@dataclass(frozen=True)
class Components:
    """Principal components of the keys of every frequency.

    Attributes:
        energies: [F, g], descending: what dropping a component costs under the metric.
        encoder: [F, g, g]; row c reads component c out of z (w = A z).
        decoder: [F, g, g]; column c writes it back (z = B w). B A = I.
    """

    energies: Float[Tensor, "F g"]
    encoder: Complex[Tensor, "F g g"]
    decoder: Complex[Tensor, "F g g"]


@dataclass(frozen=True)
class RotarySelection:
    """What stays rotary in one layer.

    Attributes:
        frequencies: [P] index into the source's frequencies of every rotary pair.
        encoder: [P, g] reads the shared rotary key out of z of that frequency.
        decoder: [P, g] writes it back: a query of head group h meets pair p as conj(decoder[p, h]) q.
        rest: [n, n] real; the position-free part of the stacked keys is rest @ k.
    """

    frequencies: Int[Tensor, "P"]
    encoder: Complex[Tensor, "P g"]
    decoder: Complex[Tensor, "P g"]
    rest: Float[Tensor, "n n"]


def components(
    second_moment: Complex[Tensor, "F g g"], metric: Complex[Tensor, "F g g"] | None = None, shrinkage: float = 0.02
) -> Components:
    """Eigenpairs of G^{1/2} M G^{1/2} frequency by frequency; the metric is shrunk toward its mean.

    Any complex mix over the heads commutes with RoPE, so the basis may be chosen freely; TransMLA's real one is a special
    case (`transmla`: pass the real part).
    """
    if metric is None:
        energies, vectors = torch.linalg.eigh(second_moment)
        energies, vectors = energies.flip(-1).clamp_min(0.0), vectors.flip(-1)
        return Components(energies, vectors.mH, vectors)
    mean = metric.diagonal(dim1=-2, dim2=-1).real.mean(-1)
    damped = (1.0 - shrinkage) * metric + shrinkage * torch.diag_embed(mean[:, None].expand(metric.shape[:2]))
    values, basis = torch.linalg.eigh(damped)
    half = (basis * values.sqrt()[:, None, :]) @ basis.mH
    inverse = (basis * values.rsqrt()[:, None, :]) @ basis.mH
    energies, vectors = torch.linalg.eigh(half @ second_moment @ half)
    energies, vectors = energies.flip(-1).clamp_min(0.0), vectors.flip(-1)
    return Components(energies, vectors.mH @ half, inverse @ vectors)


def dropped_rotation(frequencies: Float[Tensor, "F"], context: int) -> Float[Tensor, "F"]:
    """E|exp(i D theta) - 1|^2 over the distances D between two positions of a context: what standing still costs.

    Pairs of positions are uniform, so D has weight context - D. A frequency that hardly turns within the context costs
    nothing; one that turns many times costs 2.
    """
    distance = torch.arange(context, dtype=torch.float64)
    weight = (context - distance) / (context - distance).sum()
    still = (weight * torch.cos(frequencies.double()[:, None] * distance)).sum(1)
    return (2.0 - 2.0 * still).clamp_min(0.0)


def select(parts: Components, cost: Float[Tensor, "F"], num_pairs: int, mode: RopeMode = "free") -> RotarySelection:
    """Choose the pairs that stay rotary.

    Args:
        parts: from `components`.
        cost: [F] relative cost of not rotating a frequency, see `dropped_rotation`.
        num_pairs: P = qk_rope_head_dim / 2.
        mode: `free` keeps the pairs of largest energy x cost, whatever their frequencies; `stock` and `transmla` keep the
            first component of every (F / P)-th frequency, which is what an engine generates from rope_theta.

    Raises:
        RankError: more pairs than there are, or a number that does not divide the frequencies.
    """
    num_frequencies, heads = parts.energies.shape
    price = parts.energies * cost[:, None]
    if mode == "free":
        if not 0 <= num_pairs <= price.numel():
            raise RankError(f"--qk-rope-head-dim {2 * num_pairs} is outside 0..{2 * price.numel()} (all keys rotary)")
        kept = torch.zeros(price.numel(), dtype=torch.bool)
        kept[price.flatten().argsort(descending=True, stable=True)[:num_pairs]] = True
        kept = kept.view_as(price)
    else:
        if num_pairs < 1 or num_frequencies % num_pairs:
            raise RankError(
                f"--qk-rope-head-dim {2 * num_pairs}: stock frequencies need a divisor of the head width {2 * num_frequencies}"
            )
        kept = torch.zeros(num_frequencies, heads, dtype=torch.bool)
        kept[:: num_frequencies // num_pairs, 0] = True
    dropped = torch.diag_embed((~kept).to(parts.encoder.dtype))
    frequency, component = kept.nonzero().unbind(1)
    return RotarySelection(
        frequencies=frequency,
        encoder=parts.encoder[frequency, component],
        decoder=parts.decoder[frequency, :, component],
        rest=real_map(parts.decoder @ dropped @ parts.encoder),
    )


def predicted_rotation_loss(
    selection: RotarySelection,
    cost: Float[Tensor, "F"],
    curvature: Float[Tensor, "n n"],
    second_moment: Float[Tensor, "n n"],
) -> float:
    """Loss increase of dropping the rotations of one layer, in nats per token, to second order.

    A component w that stands still where it should turn by an angle is off by w (exp(i angle) - 1); angles of a context are
    taken as independent of the gradient's phase, which halves E[Re(conj(g) e)^2] to E|g|^2 E|e|^2 / 2.

    Args:
        cost: from `dropped_rotation`.
        curvature, second_moment: H (`FisherMoments.curvature`) and M of the keys.
    """
    head_dim = 2 * len(cost)
    lost = selection.rest @ second_moment @ selection.rest.T
    H, E = complex_moment(curvature, head_dim), complex_moment(lost, head_dim)
    return 0.25 * float((torch.einsum("fab,fba->f", H, E).real * cost).sum())
