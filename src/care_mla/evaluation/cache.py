"""Cache size measured on the live cache object, not computed from a configuration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from care_mla.modeling import cache_of


@dataclass(frozen=True)
class CacheUsage:
    """What a model keeps per token after a prefill.

    Attributes:
        bytes_per_token: all tensors of the cache (positions included) / tokens.
        elements_per_token: floating-point elements / tokens, all layers together.
        layer_widths: elements per token of each layer.
        element_bytes: bytes of one element.
    """

    bytes_per_token: float
    elements_per_token: float
    layer_widths: list[float]
    element_bytes: int


def cache_tensors(cache: Cache) -> tuple[list[list[Tensor]], list[Tensor]]:
    """The tensors a cache holds: by layer, and for the model as a whole."""
    layers = [
        [value for value in vars(layer).values() if isinstance(value, Tensor) and value.ndim >= 2]
        for layer in cache.layers
    ]
    shared = [value for value in vars(cache).values() if isinstance(value, Tensor)]
    kept: dict[str | None, tuple[Tensor, Tensor]] = getattr(cache, "kept", {})
    return layers, [*shared, *(part for parts in kept.values() for part in parts)]


@torch.no_grad()
def measure_cache(model: PreTrainedModel, input_ids: Tensor) -> CacheUsage:
    """Prefill [1, tokens] and add up what the cache then holds."""
    output = model(input_ids.to(model.device), use_cache=True, logits_to_keep=1)
    layers, shared = cache_tensors(cache_of(output))
    tokens = input_ids.shape[1]
    widths = [sum(t.numel() for t in tensors) / tokens for tensors in layers]
    total_bytes = sum(t.numel() * t.element_size() for tensors in [*layers, shared] for t in tensors)
    return CacheUsage(total_bytes / tokens, sum(widths), widths, next(t for ts in layers for t in ts).element_size())
