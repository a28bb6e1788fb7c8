"""Normalized queries and keys beside the layer's input: what linearized QK-norm is fitted to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from care_mla.stats.cross import CrossMoments

PARTS = ("queries", "keys")


def with_constant(x: Tensor) -> Tensor:
    """[x ; 1] for every token."""
    return torch.cat([x, x.new_ones(len(x), 1)], dim=1)


@dataclass
class NormalizedStatistics:
    """Sums of one layer with QK-norm, before RoPE.

    Attributes:
        queries: from [x ; 1] to the normalized queries, tokens as they count.
        keys: from [x ; 1] to the normalized keys; tokens count ||g|| times that where gradients were collected, as the outputs
            of `FisherMoments` do.
    """

    queries: CrossMoments
    keys: CrossMoments

    def to_tensors(self) -> dict[str, Tensor]:
        """Named tensors for safetensors."""
        return {
            f"{name}.{field}": tensor for name in PARTS for field, tensor in getattr(self, name).to_tensors().items()
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> NormalizedStatistics:
        """Inverse of `to_tensors`."""
        found = {
            name: {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
            for name in PARTS
        }
        return cls(*(CrossMoments.from_tensors(found[name]) for name in PARTS))
