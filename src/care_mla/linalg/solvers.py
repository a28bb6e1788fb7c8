"""torch's factorizations, with a failure said in one sentence that names the matrix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from care_mla.errors import NumericalError


@contextmanager
def _named(name: str, matrix: Tensor) -> Iterator[None]:
    """
    Raises:
        NumericalError: LAPACK (or what a device has in its place) gives up.
    """
    try:
        yield
    except torch.linalg.LinAlgError as error:
        entries = "" if bool(torch.isfinite(matrix).all()) else "has entries that are not finite, and "
        raise NumericalError(
            f"{name} [{len(matrix)}, {len(matrix)}] {entries}could not be factorized ({str(error).strip().splitlines()[0]}); calibrate on "
            "more or other text, or raise its shrinkage"
        ) from error


def symmetric_eigen(
    matrix: Inexact[Tensor, "... n n"], *, name: str
) -> tuple[Float[Tensor, "... n"], Inexact[Tensor, "... n n"]]:
    """Eigenvalues, ascending, and eigenvectors as columns, of symmetric (or Hermitian) matrices.

    Args:
        name: what the matrix is, for the error message.

    Raises:
        NumericalError: no convergence.
    """
    with _named(name, matrix):
        values, vectors = torch.linalg.eigh(matrix)
    return values, vectors


def positive_inverse(matrix: Float[Tensor, "n n"], *, name: str) -> Float[Tensor, "n n"]:
    """Inverse of a symmetric positive definite matrix.

    Raises:
        NumericalError: it is not positive definite.
    """
    with _named(name, matrix):
        return torch.cholesky_inverse(torch.linalg.cholesky(matrix))


def solve(matrix: Float[Tensor, "n n"], right: Float[Tensor, "n k"], *, name: str) -> Float[Tensor, "n k"]:
    """X with matrix X = right.

    Raises:
        NumericalError: a singular matrix.
    """
    with _named(name, matrix):
        solution: Tensor = torch.linalg.solve(matrix, right)
    return solution
