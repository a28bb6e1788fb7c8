"""Low-rank queries (`--q-lora-rank`): q = q_b_proj(q_a_proj(x)), with the least error of scores.

Queries matter by how they score against keys: an error e of a head's query changes its scores by e^T k', k' the keys of its
group as they are met, turned by their distance; what all keys have in common, softmax does not see. So e weighs e^T K e with K
the covariance of the turned keys (`rope.turned_covariance`), and the factors minimize

    sum_heads E[(q - q')^T K_g (q - q')] = || K^{1/2} (W_Q - W') C^{1/2} ||_F^2,   C = E[x x^T],

whose minimum is the truncated SVD of the whitened K^{1/2} W_Q C^{1/2} (Eckart-Young). It is found as everywhere here in output
space: M = W_Q C W_Q^T under the metric K, see `linalg.decompose`. Every score, whatever its attention weight, counts the same.

Source: whitening by the inputs as in SVD-LLM (arXiv 2403.07378) and CARE (arXiv 2603.17946, Eq. 2-4); q_a_proj and q_b_proj are those
of DeepSeek-V2 (arXiv 2405.04434). The metric of turned keys is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from care_mla.conversion.evidence import Evidence, constant_scale, key_moments
from care_mla.layouts import AttentionWeights, share
from care_mla.linalg import Factors, PositiveMatrix, decompose, shrink, shrink_to_isotropic, truncate
from care_mla.methods import require_inputs
from care_mla.rope import turned_covariance
from care_mla.stats import LayerStatistics

METRIC_SHRINKAGE = 0.02
"""Of the metric of keys, toward its mean eigenvalue: it must be invertible."""


def query_metric(
    turned: Float[Tensor, "g d d"], num_heads: int, scale: Float[Tensor, "nq"] | None = None
) -> Float[Tensor, "nq nq"]:
    """Block-diagonal K of all query heads, shrunk.

    Args:
        turned: covariance of each kv head's turned keys.
        scale: where a norm follows the projection, what it multiplies each query by (on average); None: nothing.
    """
    head_dim, head = turned.shape[1], torch.arange(num_heads)
    metric = torch.zeros(num_heads, head_dim, num_heads, head_dim, dtype=turned.dtype)
    metric[head, :, head] = turned[head // (num_heads // len(turned))]
    metric = metric.view(num_heads * head_dim, -1)
    if scale is not None:
        metric = scale[:, None] * metric * scale
    return shrink_to_isotropic((metric + metric.T) / 2, METRIC_SHRINKAGE)


def query_factors(
    W: Float[Tensor, "nq D"],
    input_second: Float[Tensor, "D D"],
    metric: Float[Tensor, "nq nq"],
    rank: int,
    *,
    shrinkage: float,
) -> Factors:
    """Factors of q = W x of least E[(q - q')^T K (q - q')]; a bias stays outside, as it is.

    Args:
        W: query projection, biases left out.
        input_second: C = E[x x^T].
        metric: K, see `query_metric`.
        shrinkage: of C, toward lambda I.

    Raises:
        RankError: rank outside 1..nq.
    """
    isotropic = input_second.diagonal().mean() * (W @ W.T)
    second_moment = shrink(W @ input_second @ W.T, isotropic, shrinkage)
    weights = PositiveMatrix(metric, name="the metric of the turned keys")
    return truncate(decompose(second_moment, weights, outputs_of=W), rank)


def relative_query_error(factors: Factors, W: Float[Tensor, "nq D"], input_second: Float[Tensor, "D D"]) -> float:
    """E||q - q'||^2 / E||q||^2, biases left out."""
    lost = W - factors.up @ (factors.encode @ W)
    return share((lost @ input_second) * lost, (W @ input_second) * W)


@dataclass(frozen=True)
class LowRankQueries:
    """Factors of a layer's queries, and E||q - q'||^2 / E||q||^2 of what they lose."""

    factors: Factors
    relative_error: float


def low_rank_queries(evidence: Evidence, layer: int) -> LowRankQueries | None:
    """Queries at the recipe's `q_lora_rank`; None where they stay exact.

    Raises:
        CalibrationError: no input moments.
    """
    recipe, facts = evidence.decision.recipe, evidence.decision.facts
    if recipe.q_lora_rank is None:
        return None
    weights, collected = evidence.attention(layer), evidence.outputs(layer)
    C = require_inputs(collected, "--q-lora-rank")
    keys = _normalized_key_moments(weights, collected)
    turned = turned_covariance(*keys, facts.frequencies(), recipe.context)
    metric = query_metric(turned, facts.geometry.num_heads, _norm_scale(weights, C))
    factors = query_factors(weights.q, C, metric, recipe.q_lora_rank, shrinkage=recipe.shrinkage)
    return LowRankQueries(factors, relative_query_error(factors, weights.q, C))


def _normalized_key_moments(weights: AttentionWeights, collected: LayerStatistics) -> tuple[Tensor, Tensor]:
    """E[k k^T] and E[k] of the keys that RoPE turns; of normalized ones with the mean square of each head as its norm."""
    scale = weights.key_scale()
    second, mean = key_moments(weights, collected.moments)
    return scale[:, None] * second * scale, scale * mean


def _norm_scale(weights: AttentionWeights, C: Tensor) -> Tensor | None:
    """What a norm after the projection multiplies each query by, with the mean square of each head as its norm."""
    if weights.q_norm is None:
        return None
    return constant_scale(((weights.q @ C) * weights.q).sum(1), weights.q_norm)
