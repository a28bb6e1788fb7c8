"""Refitting a linear map from cross moments."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from care_mla.errors import NumericalError
from care_mla.linalg.solvers import solve


def ridge_refit(
    W: Float[Tensor, "n m"], second_moment: Float[Tensor, "m m"], cross_moment: Float[Tensor, "n m"], ridge: float
) -> Float[Tensor, "n m"]:
    """The map nearest to W that explains targets t from inputs a: argmin E||t - W' a||^2 + r ||W' - W||^2.

    Args:
        W: the map to start from; what the data does not determine stays as it was.
        second_moment: E[a a^T], float64.
        cross_moment: E[t a^T], float64.
        ridge: r as a share of the mean diagonal of the second moment, positive.

    Raises:
        NumericalError: non-finite moments, or inputs that are all zero.

    Source: Tikhonov regularization toward a prior; closed form W + (E[t a^T] - W E[a a^T]) (E[a a^T] + r I)^-1.
    """
    scale = second_moment.diagonal().mean()
    if not bool(torch.isfinite(cross_moment).all() & torch.isfinite(second_moment).all()) or scale <= 0:
        raise NumericalError("the inputs of the map to fit are all zero or not finite")
    damped = second_moment + ridge * scale * torch.eye(len(second_moment), dtype=W.dtype, device=W.device)
    residual = cross_moment - W @ second_moment
    change = solve(damped, residual.T, name="the second moment of the inputs").T
    return W + change
