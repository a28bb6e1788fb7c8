"""The factorization behind every method: minimize E||G^{1/2} (y - y')||^2 over rank-r linear maps y' of y = W x.

Orientation: torch stores W as [out, in] and y = W x is a column; papers write X W with W transposed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from care_mla.errors import NumericalError, RankError
from care_mla.linalg.powers import PositiveMatrix
from care_mla.linalg.solvers import symmetric_eigen


@dataclass(frozen=True)
class Spectrum:
    """Eigenpairs of S = G^{1/2} M G^{1/2}, shared by allocator and truncation so that they cannot disagree.

    Attributes:
        energies: [n], descending, not negative. The energy of direction m is the error that dropping it costs.
        encoder: [n, n]; row m reads coordinate m out of y (Q^T G^{1/2}).
        decoder: [n, n]; column m writes it back (G^{-1/2} Q). decoder @ encoder = I.
    """

    energies: Float[Tensor, "n"]
    encoder: Float[Tensor, "n n"]
    decoder: Float[Tensor, "n n"]

    @property
    def width(self) -> int:
        """n, the largest rank."""
        return len(self.energies)

    def residual(self, rank: int) -> float:
        """Sum of the dropped energies: the minimum of E||G^{1/2}(y - y')||^2 at this rank."""
        return float(self.energies[rank:].sum())


@dataclass(frozen=True)
class Factors:
    """A rank-r map of outputs: latent c = encode @ y, rebuilt y' = up @ c.

    Attributes:
        encode: [r, n]. The checkpoint's down-projection is `encode @ W` [r, D].
        up: [n, r], orthonormal columns, so that latents keep the scale of the outputs.
    """

    encode: Float[Tensor, "r n"]
    up: Float[Tensor, "n r"]

    def projector(self) -> Float[Tensor, "n n"]:
        """P with y' = P y."""
        return self.up @ self.encode


def decompose(
    second_moment: Float[Tensor, "n n"], metric: PositiveMatrix | None = None, *, outputs_of: Tensor | None = None
) -> Spectrum:
    """Spectrum of the outputs under a metric.

    Args:
        second_moment: M = E[y y^T], shrunk, float64.
        metric: G, positive definite; None is the identity (plain squared error of y).
        outputs_of: [n, D], the map W of y = W x. Outputs of fewer inputs than they have elements (keys and values of MHA)
            span D directions only, and are decomposed there; the remaining n - D have energy 0.

    Raises:
        NumericalError: moments that are not finite or all zero, or a singular metric.

    Source: CARE Eq. 2-4 in output space: sqrt(C) W = U S V^T has V, S^2 = eigenpairs of W^T C W = E[y y^T]. With a
    metric, the same after the change of variable z = G^{1/2} y.
    """
    if not bool(torch.isfinite(second_moment).all()):
        raise NumericalError("the second moment of the outputs has non-finite entries; calibrate again")
    if outputs_of is not None and outputs_of.shape[0] > outputs_of.shape[1]:
        return _decompose_span(second_moment, metric, outputs_of)
    whitened, half = second_moment, None
    if metric is not None:
        half = metric.power(0.5)
        whitened = half @ second_moment @ half
    energies, vectors = symmetric_eigen((whitened + whitened.T) / 2, name="the second moment of the outputs")
    energies, vectors = energies.flip(0).clamp_min(0.0), vectors.flip(1)
    if not float(energies[0]) > 0:
        raise NumericalError(
            "the outputs to factorize are all zero, as their weights must be: the checkpoint is damaged"
        )
    if half is None or metric is None:
        return Spectrum(energies, vectors.T.contiguous(), vectors)
    return Spectrum(energies, vectors.T @ half, metric.power(-0.5) @ vectors)


def _decompose_span(
    second_moment: Float[Tensor, "n n"], metric: PositiveMatrix | None, outputs_of: Float[Tensor, "n D"]
) -> Spectrum:
    """The spectrum on the span of the outputs, which holds every optimal map, completed by directions of energy 0.

    With Q an orthonormal basis of the span, y = Q z: an error of z weighs Q^T G Q, and z has the second moment Q^T M Q.
    """
    width, inputs = outputs_of.shape
    whole = torch.linalg.qr(outputs_of, mode="complete").Q
    span, rest = whole[:, :inputs], whole[:, inputs:]
    inside = decompose(span.T @ second_moment @ span, None if metric is None else metric.restricted(span))
    return Spectrum(
        energies=torch.cat([inside.energies, inside.energies.new_zeros(width - inputs)]),
        encoder=torch.cat([inside.encoder @ span.T, rest.T]),
        decoder=torch.cat([span @ inside.decoder, rest], dim=1),
    )


def truncate(spectrum: Spectrum, rank: int) -> Factors:
    """Keep the `rank` directions of largest energy.

    Raises:
        RankError: rank outside 1..n.

    Differs from the paper, which leaves the singular values in W^a: here `up` is made orthonormal (only the product is
    determined), which keeps latents at the scale of keys and values in any dtype.
    """
    if not 1 <= rank <= spectrum.width:
        raise RankError(f"rank {rank} is outside 1..{spectrum.width}, the width of the outputs being factorized")
    up, gauge = torch.linalg.qr(spectrum.decoder[:, :rank])
    return Factors(encode=gauge @ spectrum.encoder[:rank], up=up)
