"""Shrinkage: the only place where a statistic is regularized. All methods share it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from care_mla.errors import ConfigError


def shrink(matrix: Float[Tensor, "*n"], target: Float[Tensor, "*n"], shrinkage: float) -> Float[Tensor, "*n"]:
    """Mix a second moment with its regularization target: (1 - a) M + a T.

    Args:
        matrix: symmetric positive semi-definite; or its eigenvalues, where the target is a multiple of the identity.
        target: what unlimited doubt would put in its place, on the scale of `matrix`.
        shrinkage: a, in [0, 1].

    Raises:
        ConfigError: shrinkage outside [0, 1].

    Source: CARE App. D; for outputs y = W x the target lambda W W^T makes it exactly the paper's (1-a) C + a lambda I.
    """
    if not 0.0 <= shrinkage <= 1.0:
        raise ConfigError(f"shrinkage is {shrinkage}; it mixes two matrices and must lie in [0, 1] (default 0.01)")
    return (1.0 - shrinkage) * matrix + shrinkage * target


def shrink_to_isotropic(matrix: Float[Tensor, "n n"], shrinkage: float) -> Float[Tensor, "n n"]:
    """`shrink` toward mean(diag M) * I: a direction without evidence is worth the average one."""
    scale = matrix.diagonal().mean()
    return shrink(matrix, scale * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device), shrinkage)
