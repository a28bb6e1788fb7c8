"""Linearized QK-norm (`--qk-norm linear`): normalized queries and keys as affine maps of the layer's input.

A norm divides every head by its own rms, which no linear map does; where rms hardly varies, or varies with x in ways that x shows,
an affine map comes near. It is fitted by least squares, n(x) ~ A x + c, and from there on the layer is one without QK-norm: A and c
take the place of projections and biases, statistics are those of A x, and nothing beside latent and rotary key is cached.

Source: ridge regression toward a prior, `linalg.ridge_refit`. The prior is the projection with each head's norm held at the root of
its mean square.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from care_mla.conversion.evidence import Evidence, constant_scale
from care_mla.layouts import AttentionWeights
from care_mla.linalg import ridge_refit
from care_mla.stats import CrossMoments, LayerStatistics, Moments, NormalizedStatistics

NORM_RIDGE = 0.01
"""Of the regression, as a share of the inputs' mean variance."""


def _affine(W: Float[Tensor, "n D"], bias: Float[Tensor, "n"] | None) -> Float[Tensor, "n D1"]:
    """[W, b], the map of [x ; 1]."""
    return torch.cat([W, torch.zeros(len(W), 1, dtype=W.dtype) if bias is None else bias[:, None]], dim=1)


def constant_norm(
    W: Float[Tensor, "n D"],
    bias: Float[Tensor, "n"] | None,
    norm: Float[Tensor, "d"],
    moments: CrossMoments,
) -> Float[Tensor, "n D1"]:
    """The map [W, b] of [x ; 1] with each head divided by the root of its mean square, times the norm's weight.

    Args:
        norm: weight of the norm.
        moments: with inputs [x ; 1].
    """
    both = _affine(W, bias)
    mean_squares = ((both @ (moments.input_second / moments.weight)) * both).sum(1)
    return constant_scale(mean_squares, norm)[:, None] * both


def affine_fit(
    prior: Float[Tensor, "n D1"], moments: CrossMoments, *, ridge: float = NORM_RIDGE, constant: bool = True
) -> tuple[Float[Tensor, "n D"], Float[Tensor, "n"] | None]:
    """A and c of t ~ A x + c; the constant is not shrunk.

    Args:
        prior: the map [A, c] that the ridge pulls A toward.
        moments: from [x ; 1] to the targets t.
        ridge: see `linalg.ridge_refit`.
        constant: False fits A alone.

    Raises:
        NumericalError
    """
    second, cross = moments.input_second / moments.weight, moments.cross / moments.weight
    if not constant:
        return ridge_refit(prior[:, :-1], second[:-1, :-1], cross[:, :-1], ridge), None
    x, t = second[:-1, -1], cross[:, -1]
    A = ridge_refit(prior[:, :-1], second[:-1, :-1] - torch.outer(x, x), cross[:, :-1] - torch.outer(t, x), ridge)
    return A, t - A @ x


def linearized_attention(
    source: AttentionWeights, normalized: NormalizedStatistics, *, constant: bool = True
) -> AttentionWeights:
    """An attention without QK-norm that comes nearest; values and outputs are the source's.

    Args:
        constant: whether queries and keys may have biases.

    Raises:
        NumericalError
    """
    assert source.q_norm is not None and source.k_norm is not None
    q = constant_norm(source.q, source.q_bias, source.q_norm, normalized.queries)
    k = constant_norm(source.k, source.k_bias, source.k_norm, normalized.keys)
    queries = affine_fit(q, normalized.queries, constant=constant)
    keys = affine_fit(k, normalized.keys, constant=constant)
    return replace(
        source, q=queries[0], q_bias=queries[1], k=keys[0], k_bias=keys[1], q_norm=None, k_norm=None
    )  # fmt: skip


def linearization_error(W: Float[Tensor, "n D"], bias: Float[Tensor, "n"] | None, moments: CrossMoments) -> float:
    """E||n(x) - A x - c||^2 / E||n(x)||^2 under the weights of the moments."""
    return moments.relative_error(_affine(W, bias))


def linearized_statistics(
    linear: AttentionWeights, normalized: NormalizedStatistics, collected: LayerStatistics
) -> LayerStatistics:
    """Statistics of [A x ; v], biases left out: moments from those of x, exactly, gradients those at the normalized keys.

    Args:
        linear: from `linearized_attention`.
        collected: of the source's layer, from whose moments comes what does not depend on keys; gradients, if any, at the
            normalized keys.
    """
    W, x = linear.keys_and_values, normalized.queries
    inputs, total = x.input_second[:-1, :-1], x.input_second[:-1, -1]
    moments = Moments(
        weight=x.weight,
        num_tokens=x.num_tokens,
        output_sum=W @ total,
        output_second=W @ inputs @ W.T,
        input_energy=inputs.diagonal().sum(),
        input_magnitude=collected.moments.input_magnitude,
        input_second=inputs,
    )
    if collected.fisher is None:
        return LayerStatistics(moments)
    weighted = normalized.keys
    fisher = replace(
        collected.fisher,
        output_weight=weighted.weight,
        output_sum=W @ weighted.input_second[:-1, -1],
        output_second=W @ weighted.input_second[:-1, :-1] @ W.T,
    )
    return LayerStatistics(moments, fisher, collected.eigenpairs)


class LinearNormsEvidence(Evidence):
    """Weights and statistics of the linearized layers, which are layers without QK-norm."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.normalized_gradients = True
        self.attention = lru_cache(maxsize=1)(self._linearized)

    def _linearized(self, layer: int) -> AttentionWeights:
        constant = self.decision.recipe.centre
        return linearized_attention(self.source.attention(layer), self.store.normalized(layer), constant=constant)

    def outputs(self, layer: int, *, with_fisher: bool = False) -> LayerStatistics:
        collected = super().outputs(layer, with_fisher=with_fisher)
        return linearized_statistics(self.attention(layer), self.store.normalized(layer), collected)

    def latent_outputs(self, layer: int, *, with_fisher: bool) -> tuple[LayerStatistics, Tensor]:
        return self.outputs(layer, with_fisher=with_fisher), self.attention(layer).keys_and_values

    def record(self, layer: int) -> dict[str, Any]:
        """E||n(x) - A x - c||^2 / E||n(x)||^2 of linearized queries and keys, by projection."""
        weights, normalized = self.attention(layer), self.store.normalized(layer)
        errors = {
            "q": linearization_error(weights.q, weights.q_bias, normalized.queries),
            "k": linearization_error(weights.k, weights.k_bias, normalized.keys),
        }
        return {"norm_error": errors}
