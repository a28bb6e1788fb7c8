"""Low-rank queries of one layer, from its weights and statistics."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from care_mla.config import Recipe
from care_mla.geometry import Geometry
from care_mla.linalg import Factors
from care_mla.mapping import AttentionWeights, constant_scale, query_factors, query_metric, relative_query_error
from care_mla.methods import require_inputs
from care_mla.pipeline.evidence import key_moments
from care_mla.pipeline.spectra import LayerSpectra
from care_mla.rope import turned_covariance
from care_mla.stats import LayerStatistics


@dataclass(frozen=True)
class LowRankQueries:
    """Factors of a layer's queries, and E||q - q'||^2 / E||q||^2 of what they lose."""

    factors: Factors
    relative_error: float


def low_rank_queries(
    geometry: Geometry, spectra: LayerSpectra, weights: AttentionWeights, recipe: Recipe, layer: int
) -> LowRankQueries | None:
    """Queries at `recipe.q_lora_rank`; None where they stay exact. See `mapping.queries`."""
    if recipe.q_lora_rank is None:
        return None
    assert spectra.frequencies is not None
    collected = spectra.evidence.plain(layer)
    C = require_inputs(collected, "--q-lora-rank")
    keys = _key_moments(weights, collected)
    turned = turned_covariance(*keys, spectra.frequencies, recipe.context)
    metric = query_metric(turned, geometry.num_heads, _norm_scale(weights, C))
    factors = query_factors(weights.q, C, metric, recipe.q_lora_rank, shrinkage=recipe.shrinkage)
    return LowRankQueries(factors, relative_query_error(factors, weights.q, C))


def _key_moments(weights: AttentionWeights, collected: LayerStatistics) -> tuple[Tensor, Tensor]:
    """E[k k^T] and E[k] of the keys that RoPE turns; of normalized ones with the mean square of each head as its norm."""
    scale = weights.key_scale()
    second, mean = key_moments(weights, collected.moments)
    return scale[:, None] * second * scale, scale * mean


def _norm_scale(weights: AttentionWeights, C: Tensor) -> Tensor | None:
    """What a norm after the projection multiplies each query by, with the mean square of each head as its norm."""
    if weights.q_norm is None:
        return None
    return constant_scale(((weights.q @ C) * weights.q).sum(1), weights.q_norm)
