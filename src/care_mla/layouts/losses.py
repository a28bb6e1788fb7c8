"""What truncated latents lose: relative errors of keys and values, and the loss increase that is predicted of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from care_mla.linalg import Factors
from care_mla.stats import LayerStatistics


def reconstruction_error(factors: Sequence[Factors], width: int, *, rows: Sequence[slice]) -> Float[Tensor, "m m"]:
    """I - P, block by block: what a conversion loses of y is (I - P)(y - mu).

    Args:
        width: m, of y.
        rows: of y that each of the factors covers, see `Layout.rows`.
    """
    error = torch.eye(width, dtype=factors[0].up.dtype)
    for factor, block in zip(factors, rows, strict=True):
        error[block, block] -= factor.projector()
    return error


def _deviation(
    second_moment: Float[Tensor, "m m"], output_mean: Float[Tensor, "m"] | None, centre: Float[Tensor, "m"] | None
) -> Float[Tensor, "m m"]:
    """E[(y - mu)(y - mu)^T] from E[y y^T] and E[y]; mu None is zero."""
    if centre is None:
        return second_moment
    assert output_mean is not None
    cross = torch.outer(output_mean, centre)
    return second_moment - cross - cross.T + torch.outer(centre, centre)


def _lost_map(
    factors: Sequence[Factors], width: int, rows: Sequence[slice], content: Float[Tensor, "m m"] | None
) -> Float[Tensor, "m m"]:
    """E with E (y - mu) what a conversion loses of y."""
    error = reconstruction_error(factors, width, rows=rows)
    return error if content is None else error @ content


def predicted_loss_increase(
    factors: Sequence[Factors],
    statistics: LayerStatistics,
    *,
    rows: Sequence[slice],
    centre: Float[Tensor, "m"] | None = None,
    content: Float[Tensor, "m m"] | None = None,
) -> float:
    """Loss increase of converting this layer alone, in nats per token, to second order: tr(H E M E^T) / 2, E = I - P.

    H and M are the Fisher statistics as they are, neither tempered nor shrunk, whatever metric chose the factors. Layers add up;
    errors of different tokens, and of layers on top of each other, are taken as independent.

    Args:
        statistics: with Fisher statistics.
        rows: of y that each of the factors covers.
        centre: mu given back as a constant, if the conversion was centred.
        content: B where the latents carry B y, not y; what B leaves out costs nothing here.
    """
    fisher = statistics.fisher
    assert fisher is not None
    deviation = _deviation(fisher.second_moment, fisher.mean, centre)
    error = _lost_map(factors, len(deviation), rows, content)
    curvature = fisher.curvature(statistics.moments.second_moment)
    return 0.5 * float(((curvature @ error) * (error @ deviation)).sum())


def relative_errors(
    factors: Sequence[Factors],
    second_moment: Float[Tensor, "m m"],
    *,
    rows: Sequence[slice],
    output_mean: Float[Tensor, "m"] | None = None,
    centre: Float[Tensor, "m"] | None = None,
    content: Float[Tensor, "m m"] | None = None,
) -> tuple[float, float]:
    """E||y - y'||^2 / E||y||^2 of the keys and of the values: one yardstick for every method.

    Args:
        second_moment, output_mean: E[y y^T] and E[y], neither shrunk nor weighted.
        rows, centre, content: as of `predicted_loss_increase`.
    """
    deviation = _deviation(second_moment, output_mean, centre)
    error = _lost_map(factors, len(second_moment), rows, content)
    lost, total = (error @ deviation @ error.T).diagonal(), second_moment.diagonal()
    keys, values = (slice(0, len(total) // 2), slice(len(total) // 2, len(total)))
    return share(lost[keys], total[keys]), share(lost[values], total[values])


def share(part: Tensor, whole: Tensor) -> float:
    """sum(part) / sum(whole); of nothing, nothing is lost: 0."""
    total = float(whole.sum())
    return float(part.sum()) / total if total else 0.0
