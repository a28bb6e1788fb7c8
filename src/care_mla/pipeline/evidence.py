"""What one layer is converted from under a recipe: weights, and statistics of their outputs."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from care_mla.config import Recipe
from care_mla.files import write_tensors
from care_mla.mapping import (
    AttentionWeights,
    constant_scale,
    linearization_error,
    linearized_attention,
    linearized_statistics,
)
from care_mla.methods import get_method, require_inputs
from care_mla.pipeline.source import Source
from care_mla.stats import LayerStatistics, Moments, StatisticsStore


class SharedEigenpairs:
    """Eigenpairs of every layer's gradient moment G, found once and kept on disk for all recipes that are compared."""

    def __init__(self, directory: Path):
        self.directory = directory

    def add_to(self, collected: LayerStatistics, layer: int, *, normalized: bool) -> LayerStatistics:
        """The statistics with the eigenpairs of their G.

        Args:
            normalized: whether the gradients are those of normalized keys; a layer may have both.
        """
        path = self.directory / f"gradients_{'normalized_' if normalized else ''}{layer}.safetensors"
        if path.is_file():
            tensors = load_file(path)
            return replace(collected, eigenpairs=(tensors["values"], tensors["vectors"]))
        values, vectors = collected.gradients.eigenpairs
        write_tensors(path, {"values": values, "vectors": vectors})
        return replace(collected, eigenpairs=(values, vectors))


class Evidence:
    """Weights and statistics of every layer, read when asked for.

    With `--qk-norm linear` both are those of the linearized layer, which is one without QK-norm.
    """

    def __init__(self, source: Source, statistics: StatisticsStore, recipe: Recipe):
        self.source, self.store, self.recipe = source, statistics, recipe
        self.linear = recipe.qk_norm == "linear"
        self.caches_scales = recipe.layout == "mla" and source.family.k_norm is not None and not self.linear
        """Whether 1 / rms of the original keys is cached, see `mapping.mla`."""
        self.at_normalized_keys = self.caches_scales or self.linear
        self.fisher = statistics.normalized_fisher if self.at_normalized_keys else statistics.fisher
        """layer -> its gradients, where the latent's error meets them: behind a norm that is not run on what is rebuilt."""
        self.has_fisher = statistics.has_normalized_fisher if self.at_normalized_keys else statistics.has_fisher
        self.attention = lru_cache(maxsize=1)(self._attention)  # a layer's regression serves all that ask of the layer
        """layer -> projections that are mapped; layout mla."""

    def _attention(self, layer: int) -> AttentionWeights:
        weights = self.source.attention(layer)
        if self.linear:
            return linearized_attention(weights, self.store.normalized(layer), constant=self.recipe.centre)
        return replace(weights, k_size=self._key_size(layer, weights)) if self.caches_scales else weights

    def _key_size(self, layer: int, weights: AttentionWeights) -> Tensor:
        """What the norm divides every key by, with the mean square of each head on average; [n]."""
        second, _ = key_moments(weights, self.store.layer(layer))
        eps = float(self.source.reader.config.get("rms_norm_eps", 1e-6))
        return 1.0 / constant_scale(second.diagonal() + eps, weights.k.new_ones(self.source.geometry.head_dim))

    def plain(self, layer: int, *, with_fisher: bool = False) -> LayerStatistics:
        """Statistics of the outputs of keys and values, biases left out; gradients are those of `fisher`."""
        collected = LayerStatistics(self.store.layer(layer), self.fisher(layer) if with_fisher else None)
        if not self.linear:
            return collected
        return linearized_statistics(self.attention(layer), self.store.normalized(layer), collected)

    def carried(self, layer: int, *, with_fisher: bool) -> tuple[LayerStatistics, Tensor]:
        """Statistics of what latents carry, and the map [2n, D] to it: keys and values, the keys as large as an exact norm makes them."""
        collected = self.plain(layer, with_fisher=with_fisher)
        if self.linear:
            return collected, self.attention(layer).keys_and_values
        W = self.source.stacked_weights(layer)
        if not self.caches_scales:
            return collected, W
        keys = self.attention(layer).key_scale()
        scale = torch.cat([keys, torch.ones_like(keys)])
        return replace(collected, moments=collected.moments.carrying(torch.diag(scale))), scale[:, None] * W

    def norm_errors(self, layer: int) -> dict[str, float]:
        """E||n(x) - A x - c||^2 / E||n(x)||^2 of linearized queries and keys, by projection."""
        weights, normalized = self.attention(layer), self.store.normalized(layer)
        return {
            "q": linearization_error(weights.q, weights.q_bias, normalized.queries),
            "k": linearization_error(weights.k, weights.k_bias, normalized.keys),
        }


def key_moments(weights: AttentionWeights, moments: Moments) -> tuple[Tensor, Tensor]:
    """E[k k^T] and E[k] of the stacked keys, biases included."""
    n = len(weights.k)
    bias = weights.k.new_zeros(n) if weights.k_bias is None else weights.k_bias
    second, mean = moments.second_moment[:n, :n], moments.mean[:n]
    second = second + torch.outer(mean, bias) + torch.outer(bias, mean) + torch.outer(bias, bias)
    return second, mean + bias


def require_statistics(statistics: StatisticsStore, recipe: Recipe) -> None:
    """Refuse statistics without what a recipe asks of them, before anything is computed.

    Raises:
        CalibrationError
    """
    if recipe.qk_norm == "linear":
        statistics.normalized(0)
        if get_method(recipe.method).needs_fisher:
            statistics.normalized_fisher(0)
    elif recipe.q_lora_rank is not None:
        require_inputs(LayerStatistics(statistics.layer(0)), "--q-lora-rank")
