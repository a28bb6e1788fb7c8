"""Cache budgets and the per-layer ranks that spend them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from care_mla.geometry import Geometry
from care_mla.layouts.base import Layout
from care_mla.ranks.budget import budget_elements


@dataclass(frozen=True)
class RankPlan:
    """Latent widths per layer and block; the last thing decided before weights are touched.

    Attributes:
        layout: which latents a layer has.
        ranks: [layer][block], blocks in the order of `layout.blocks`.
        beside: name -> elements that every layer caches beside its latents.
    """

    layout: Layout
    ranks: tuple[tuple[int, ...], ...]
    beside: Mapping[str, int] = field(default_factory=dict)

    @property
    def cached_widths(self) -> tuple[int, ...]:
        """Cached elements per token of each layer."""
        return tuple(sum(layer) + sum(self.beside.values()) for layer in self.ranks)

    @property
    def cache_elements_per_token(self) -> int:
        """Cached elements per token over all layers, everything counted."""
        return sum(self.cached_widths)

    def kv_save(self, geometry: Geometry) -> float:
        """Share of the original cache that is saved."""
        return 1.0 - self.cache_elements_per_token / geometry.cache_elements_per_token

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for manifests."""
        return {"layout": self.layout.name, "ranks": [list(layer) for layer in self.ranks], **self.beside}


@dataclass(frozen=True)
class Budget:
    """A cache budget for the whole model and the geometry that it is spent on.

    Attributes:
        elements: most cached elements per token that latents may take, all layers together.
        beside: of every layer, see `RankPlan`; already taken off.
    """

    geometry: Geometry
    layout: Layout
    elements: int
    beside: Mapping[str, int] = field(default_factory=dict)

    @property
    def kv_save(self) -> float:
        """Share of the original cache that is saved when all of it is spent."""
        spent = self.elements + self.geometry.num_layers * sum(self.beside.values())
        return 1.0 - spent / self.geometry.cache_elements_per_token

    @property
    def num_blocks(self) -> int:
        """Latents per layer."""
        return len(self.layout.blocks)

    @property
    def width(self) -> int:
        """Largest rank of one latent."""
        return self.layout.block_width(self.geometry)

    @property
    def nominal_rank(self) -> float:
        """Rank of every latent if all were equal; may be a fraction."""
        return self.elements / (self.geometry.num_layers * self.num_blocks)


def make_budget(
    geometry: Geometry,
    layout: Layout,
    *,
    rank: int | None = None,
    kv_save: float | None = None,
    cache_elements: int | None = None,
    beside: Mapping[str, int] | None = None,
) -> Budget:
    """Turn one of the three ways to name a budget into cached elements per token.

    Args:
        rank: the paper's r, for K and for V; a joint latent gets 2r.
        kv_save: share of the cache to save, in [0, 1).
        cache_elements: cached elements per token, all layers together.
        beside: name -> elements that every layer caches beside its latents, paid for out of the budget.

    Raises:
        RankError: none or several given, or out of range.
    """
    elements = budget_elements(
        geometry,
        num_blocks=len(layout.blocks),
        rank=rank,
        kv_save=kv_save,
        cache_elements=cache_elements,
        beside=beside,
    )
    beside = beside or {}
    return Budget(geometry, layout, elements - geometry.num_layers * sum(beside.values()), beside)
