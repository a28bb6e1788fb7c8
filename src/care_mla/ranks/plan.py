"""Cache budgets and the per-layer ranks that spend them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from care_mla.errors import RankError
from care_mla.geometry import Geometry
from care_mla.names import Layout

BLOCKS: dict[Layout, tuple[str, ...]] = {"split": ("k", "v"), "joint": ("kv",), "mla": ("kv",)}
"""The latents of a layer, by layout."""


def block_width(geometry: Geometry, layout: Layout) -> int:
    """Largest rank of one latent: n for keys or values alone, 2n for both together."""
    return geometry.kv_width * (1 if layout == "split" else 2)


@dataclass(frozen=True)
class RankPlan:
    """Latent widths per layer and block; the last thing decided before weights are touched.

    Attributes:
        layout: which latents a layer has.
        ranks: [layer][block], blocks in the order of `BLOCKS[layout]`.
        qk_rope_head_dim: width of the shared rotary key of every layer; layout mla alone has one.
        key_scales: cached scales of normalized keys of every layer, one a kv head; layout mla of a source with QK-norm.
    """

    layout: Layout
    ranks: tuple[tuple[int, ...], ...]
    qk_rope_head_dim: int = 0
    key_scales: int = 0

    @property
    def cached_widths(self) -> tuple[int, ...]:
        """Cached elements per token of each layer."""
        return tuple(sum(layer) + self.qk_rope_head_dim + self.key_scales for layer in self.ranks)

    @property
    def cache_elements_per_token(self) -> int:
        """Cached elements per token over all layers, everything counted."""
        return sum(self.cached_widths)

    def kv_save(self, geometry: Geometry) -> float:
        """Share of the original cache that is saved."""
        return 1.0 - self.cache_elements_per_token / geometry.cache_elements_per_token

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for manifests."""
        rope = {"qk_rope_head_dim": self.qk_rope_head_dim} if self.qk_rope_head_dim else {}
        scales = {"key_scales": self.key_scales} if self.key_scales else {}
        return {"layout": self.layout, "ranks": [list(layer) for layer in self.ranks], **rope, **scales}


@dataclass(frozen=True)
class Budget:
    """A cache budget for the whole model and the geometry that it is spent on.

    Attributes:
        elements: most cached elements per token that latents may take, all layers together.
        qk_rope_head_dim, key_scales: of every layer, see `RankPlan`; already taken off.
    """

    geometry: Geometry
    layout: Layout
    elements: int
    qk_rope_head_dim: int = 0
    key_scales: int = 0

    @property
    def kv_save(self) -> float:
        """Share of the original cache that is saved when all of it is spent."""
        spent = self.elements + self.geometry.num_layers * (self.qk_rope_head_dim + self.key_scales)
        return 1.0 - spent / self.geometry.cache_elements_per_token

    @property
    def num_blocks(self) -> int:
        """Latents per layer."""
        return len(BLOCKS[self.layout])

    @property
    def width(self) -> int:
        """Largest rank of one latent."""
        return block_width(self.geometry, self.layout)

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
    qk_rope_head_dim: int = 0,
    key_scales: int = 0,
) -> Budget:
    """Turn one of the three ways to name a budget into cached elements per token.

    Args:
        rank: the paper's r, for K and for V; a joint latent gets 2r.
        kv_save: share of the cache to save, in [0, 1).
        cache_elements: cached elements per token, all layers together.
        qk_rope_head_dim, key_scales: of every layer, paid for out of the budget; layout mla.

    Raises:
        RankError: none or several given, or out of range.
    """
    full, layers = geometry.cache_elements_per_token, geometry.num_layers
    given = {"rank": rank, "kv_save": kv_save, "cache_elements": cache_elements}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise RankError(f"give exactly one of --rank, --kv-save, --cache-elements (got {', '.join(named) or 'none'})")
    if rank is not None:
        if not 1 <= rank <= geometry.kv_width:
            raise RankError(
                f"--rank {rank} is outside 1..{geometry.kv_width} (KV parity: num_kv_heads x head_dim = {geometry.kv_width})"
            )
        elements = 2 * rank * layers
    elif kv_save is not None:
        if not (math.isfinite(kv_save) and 0.0 <= kv_save < 1.0):
            raise RankError(f"--kv-save {kv_save} is outside [0, 1); 0.5 halves the cache")
        elements = math.floor(full * (1.0 - kv_save) + 1e-6)
    else:
        assert cache_elements is not None
        elements = cache_elements
    rope = layers * (qk_rope_head_dim + key_scales)
    least, most = rope + len(BLOCKS[layout]) * layers, rope + full
    if not least <= elements <= most:
        beside = f" beside a rotary key of {qk_rope_head_dim + key_scales} in each (--qk-rope-head-dim)" if rope else ""
        raise RankError(
            f"a budget of {elements} cached elements per token is outside {least}..{most} ({layers} layers, rank 1 to KV parity{beside})"
        )
    return Budget(geometry, layout, elements - rope, qk_rope_head_dim, key_scales)
