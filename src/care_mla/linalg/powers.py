"""Symmetric positive semi-definite matrices, their eigenpairs and powers."""

from __future__ import annotations

from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from care_mla.errors import NumericalError
from care_mla.linalg.solvers import symmetric_eigen

RELATIVE_CUTOFF = 1e-12
"""Eigenvalues below this share of the largest are rounding noise of float64 moments, not evidence."""


class PositiveMatrix:
    """A symmetric positive semi-definite matrix [n, n], float64, that is factorized at most once, and only when asked to be.

    Made of the matrix, or of its eigenpairs; the other is found when it is needed.
    """

    def __init__(
        self,
        matrix: Tensor | None = None,
        *,
        name: str = "matrix",
        eigenpairs: tuple[Tensor, Tensor] | None = None,
    ):
        """
        Args:
            matrix: symmetric; None where eigenpairs are given.
            name: what the matrix is, for error messages.
            eigenpairs: eigenvalues [n], and eigenvectors [n, n] as columns.
        """
        assert (matrix is None) != (eigenpairs is None)
        self.name = name
        if matrix is not None:
            self.matrix = matrix
        if eigenpairs is not None:
            self.eigenpairs = eigenpairs

    @cached_property
    def matrix(self) -> Float[Tensor, "n n"]:
        """The matrix itself."""
        return self._of_eigenvalues(self.eigenpairs[0])

    @cached_property
    def eigenpairs(self) -> tuple[Float[Tensor, "n"], Float[Tensor, "n n"]]:
        """Eigenvalues and eigenvectors as columns.

        Raises:
            NumericalError: no convergence.
        """
        return symmetric_eigen((self.matrix + self.matrix.T) / 2, name=self.name)

    def power(self, exponent: float) -> Float[Tensor, "n n"]:
        """A^p. Eigenvalues below `RELATIVE_CUTOFF` of the largest count as zero.

        Args:
            exponent: any real; a negative one needs full rank.

        Raises:
            NumericalError: a negative power of a matrix that is singular to working precision.
        """
        return self._of_eigenvalues(self._powers(exponent))

    def tempered(self, exponent: float, scale: float | Tensor = 1.0) -> PositiveMatrix:
        """scale * A^p, which has the same eigenvectors."""
        return PositiveMatrix(name=self.name, eigenpairs=(scale * self._powers(exponent), self.eigenpairs[1]))

    def restricted(self, basis: Float[Tensor, "n r"]) -> PositiveMatrix:
        """Q^T A Q: the quadratic form on the span of Q's columns."""
        return PositiveMatrix(basis.T @ self.matrix @ basis, name=self.name)

    def block(self, rows: slice) -> PositiveMatrix:
        """A diagonal block; the matrix itself where the block is all of it."""
        if len(range(len(self.matrix))[rows]) == len(self.matrix):
            return self
        return PositiveMatrix(self.matrix[rows, rows], name=self.name)

    @property
    def effective_rank(self) -> float:
        """Independent directions that it gives evidence of: exp of the entropy of the normalized eigenvalues.

        Source: Roy and Vetterli, The effective rank, 2007.
        """
        eigenvalues = self.eigenpairs[0].clamp_min(0.0)
        return float(torch.special.entr(eigenvalues / eigenvalues.sum()).sum().exp())

    def _powers(self, exponent: float) -> Tensor:
        eigenvalues = self.eigenpairs[0]
        kept = eigenvalues > RELATIVE_CUTOFF * eigenvalues.max().clamp_min(0.0)
        if exponent < 0 and not bool(kept.all()):
            raise NumericalError(
                f"{self.name} has {int(kept.sum())} independent directions of {len(eigenvalues)} and cannot be inverted; "
                "calibrate on more tokens or raise its shrinkage"
            )
        powers = eigenvalues.clamp_min(torch.finfo(eigenvalues.dtype).tiny) ** exponent
        return torch.where(kept, powers, torch.zeros_like(eigenvalues))

    def _of_eigenvalues(self, values: Tensor) -> Tensor:
        vectors = self.eigenpairs[1]
        return (vectors * values) @ vectors.T
