"""What one layer is converted from: weights, and statistics of their outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from care_mla.config import Recipe
from care_mla.conversion.decide import Decision, statistics_needed
from care_mla.conversion.source import Source
from care_mla.files import write_tensors
from care_mla.layouts import AttentionWeights
from care_mla.methods import require_inputs
from care_mla.stats import FisherMoments, LayerStatistics, Moments, StatisticsStore


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

    Attributes:
        normalized_gradients: whether gradients are those at normalized keys, which is where the latents' error meets them if the
            norm is not run on what is rebuilt from them.
        attention: layer -> projections that are mapped.
    """

    def __init__(self, source: Source, statistics: StatisticsStore, decision: Decision):
        self.source, self.store, self.decision = source, statistics, decision
        self.normalizes_outside = decision.layout.normalizes_outside(decision.facts, decision.options)
        self.normalized_gradients = self.normalizes_outside
        self.attention = lru_cache(maxsize=1)(self._attention)  # one reading serves all that ask of a layer

    @property
    def has_fisher(self) -> bool:
        """Whether there are gradients."""
        return self.store.has_normalized_fisher if self.normalized_gradients else self.store.has_fisher

    def _attention(self, layer: int) -> AttentionWeights:
        weights = self.source.attention(layer)
        if not self.normalizes_outside:
            return weights
        second, _ = key_moments(weights, self.store.layer(layer))
        eps = float(self.source.reader.config.get("rms_norm_eps", 1e-6))
        size = 1.0 / constant_scale(second.diagonal() + eps, weights.k.new_ones(self.source.geometry.head_dim))
        return replace(weights, k_size=size)

    def outputs(self, layer: int, *, with_fisher: bool = False) -> LayerStatistics:
        """Statistics of keys and values as projected, biases left out."""
        read: Callable[[int], FisherMoments] = (
            self.store.normalized_fisher if self.normalized_gradients else self.store.fisher
        )
        return LayerStatistics(self.store.layer(layer), read(layer) if with_fisher else None)

    def latent_outputs(self, layer: int, *, with_fisher: bool) -> tuple[LayerStatistics, Tensor]:
        """Statistics of what latents are made of, and the map [2n, D] to it: keys and values, the keys as large as a norm outside
        makes them."""
        collected, W = self.outputs(layer, with_fisher=with_fisher), self.source.stacked_weights(layer)
        if not self.normalizes_outside:
            return collected, W
        keys = self.attention(layer).key_scale()
        scale = torch.cat([keys, torch.ones_like(keys)])
        return replace(collected, moments=collected.moments.carrying(torch.diag(scale))), scale[:, None] * W

    def record(self, layer: int) -> dict[str, Any]:
        """What the manifest says of how a layer's weights were changed before they were factorized."""
        return {}


def key_moments(weights: AttentionWeights, moments: Moments) -> tuple[Tensor, Tensor]:
    """E[k k^T] and E[k] of the stacked keys, biases included."""
    n = len(weights.k)
    bias = weights.k.new_zeros(n) if weights.k_bias is None else weights.k_bias
    second, mean = moments.second_moment[:n, :n], moments.mean[:n]
    second = second + torch.outer(mean, bias) + torch.outer(bias, mean) + torch.outer(bias, bias)
    return second, mean + bias


def constant_scale(mean_squares: Tensor, norm: Tensor) -> Tensor:
    """What a norm over heads multiplies each output by, were every head's mean square what it is on average; [n].

    Args:
        mean_squares: [n], E[y_i^2] of the stacked heads before the norm.
        norm: [d], its weight.
    """
    return (norm * mean_squares.view(-1, len(norm)).mean(1, keepdim=True).rsqrt()).flatten()


def open_statistics(source: Source, directory: str | Path) -> StatisticsStore:
    """The statistics of a STATS directory.

    Raises:
        CalibrationError: not statistics, or of another model.
    """
    statistics = StatisticsStore(Path(directory))
    statistics.require_source(source.reader.fingerprint, source.name)
    return statistics


def require_statistics(statistics: StatisticsStore, recipe: Recipe) -> None:
    """Refuse statistics without what a recipe asks of them, before anything is computed.

    Raises:
        CalibrationError
    """
    needed = statistics_needed(recipe)
    if needed["normalized"]:
        statistics.normalized(0)
        if needed["fisher"]:
            statistics.normalized_fisher(0)
    elif recipe.q_lora_rank is not None:
        require_inputs(LayerStatistics(statistics.layer(0)), "--q-lora-rank")
