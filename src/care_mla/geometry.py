"""Head counts and widths of a model's attention: the facts every stage shares."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Attention geometry of a decoder whose layers are alike.

    Attributes:
        num_layers: decoder layers.
        hidden_size: D, width of the residual stream.
        num_heads: query heads n_h.
        num_kv_heads: key/value heads g_h (1 is MQA, num_heads is MHA).
        head_dim: d_h, width of one query, key or value head.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def kv_width(self) -> int:
        """n = g_h * d_h: elements of one token's keys (or values) in one layer. Also the rank of KV parity."""
        return self.num_kv_heads * self.head_dim

    @property
    def cache_elements_per_token(self) -> int:
        """Elements the unconverted model caches per token, keys and values of all layers."""
        return self.num_layers * 2 * self.kv_width

    @property
    def attention_kind(self) -> str:
        """MHA, GQA or MQA."""
        if self.num_kv_heads == self.num_heads:
            return "MHA"
        return "MQA" if self.num_kv_heads == 1 else "GQA"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for manifests."""
        return asdict(self)
