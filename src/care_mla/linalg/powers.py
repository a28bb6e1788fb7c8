"""Powers of symmetric positive semi-definite matrices."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from care_mla.errors import NumericalError
from care_mla.linalg.solvers import symmetric_eigen

RELATIVE_CUTOFF = 1e-12
"""Eigenvalues below this share of the largest are rounding noise of float64 moments, not evidence."""


def symmetric_power(matrix: Float[Tensor, "n n"], exponent: float, *, name: str = "matrix") -> Float[Tensor, "n n"]:
    """Symmetric power A^p of a positive semi-definite matrix.

    Args:
        matrix: symmetric, float64.
        exponent: any real; a negative one needs full rank.
        name: what the matrix is, for the error message.

    Raises:
        NumericalError: a negative power of a matrix that is singular to working precision.
    """
    eigenvalues, vectors = symmetric_eigen((matrix + matrix.T) / 2, name=name)
    cutoff = RELATIVE_CUTOFF * eigenvalues[-1].clamp_min(0.0)
    kept = eigenvalues > cutoff
    if exponent < 0 and not bool(kept.all()):
        raise NumericalError(
            f"{name} has {int(kept.sum())} independent directions of {len(matrix)} and cannot be inverted; "
            "calibrate on more tokens or raise its shrinkage"
        )
    powers: Tensor = torch.where(
        kept, eigenvalues.clamp_min(torch.finfo(matrix.dtype).tiny) ** exponent, torch.zeros_like(eigenvalues)
    )
    result: Tensor = (vectors * powers) @ vectors.T
    return result
