"""Distances between two positions of a context, and what turning over them does to keys."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from care_mla.rope.complex import half_split_heads


def distance_weights(context: int) -> Float[Tensor, "context"]:
    """Weight context - D of every distance D, normalized: pairs of positions are uniform."""
    weight = context - torch.arange(context, dtype=torch.float64)
    return weight / weight.sum()


def turned_covariance(
    second_moment: Float[Tensor, "n n"], mean: Float[Tensor, "n"], frequencies: Float[Tensor, "F"], context: int
) -> Float[Tensor, "g d d"]:
    """Covariance of each head's keys as queries meet them: turned by their distance, over all distances of a context.

    With z the complex pairs, E[z_f conj(z_h)] and E[z_f z_h] are multiplied by the mean phases exp(-i D (theta_f -+ theta_h)).

    Args:
        second_moment, mean: E[k k^T] and E[k] of the stacked heads, before RoPE, biases included.
        frequencies: angles per position, F = d / 2.
        context: distances D < context weigh context - D.
    """
    F = len(frequencies)
    weight = distance_weights(context)
    phase = torch.exp(-1j * torch.outer(frequencies.double(), torch.arange(context, dtype=torch.float64)))  # [F, D]
    weighted = phase * weight
    heads = len(mean) // (2 * F)
    blocks = second_moment.view(heads, 2, F, heads, 2, F).diagonal(dim1=0, dim2=3).movedim(-1, 0)  # [g, 2, F, 2, F]
    xx, xy, yx, yy = blocks[:, 0, :, 0], blocks[:, 0, :, 1], blocks[:, 1, :, 0], blocks[:, 1, :, 1]
    still = half_split_heads(mean, 2 * F) * weighted.sum(1)  # [g, F]
    P = torch.complex(xx + yy, yx - xy) * (weighted @ phase.mH) - still[:, :, None] * still[:, None].conj()
    Q = torch.complex(xx - yy, yx + xy) * (weighted @ phase.T) - still[:, :, None] * still[:, None]
    top = torch.cat([(P + Q).real, (Q - P).imag], dim=2)
    bottom = torch.cat([(P + Q).imag, (P - Q).real], dim=2)
    return torch.cat([top, bottom], dim=1) / 2
