"""A model on disk that can be converted: its attention weights in one orientation, whatever names and forms they are stored in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from care_mla.checkpoint import CheckpointReader
from care_mla.errors import CheckpointError
from care_mla.families import FamilySpec
from care_mla.families.spec import Projection
from care_mla.geometry import Geometry
from care_mla.layouts import AttentionWeights, SourceFacts

PROJECTIONS: tuple[Projection, ...] = ("q", "k", "v", "o")


@dataclass(frozen=True)
class Source:
    """A model on disk, its weights not yet read.

    Attributes:
        reader: what transformers loads, under the names of the family's CausalLM, however they are stored.
        dtype: that transformers loads it in.
        frequencies: gives the angles per position [F] of its rotary pairs, as transformers computes them.
    """

    name: str
    directory: Path
    reader: CheckpointReader
    family: FamilySpec
    geometry: Geometry
    dtype: torch.dtype
    frequencies: Callable[[], Tensor]

    @cached_property
    def facts(self) -> SourceFacts:
        """What layouts ask of it."""
        return SourceFacts(self.geometry, self.family.features(self.reader.config), self.frequencies)

    def projection(self, layer: int, projection: Projection) -> tuple[Tensor, Tensor | None]:
        """Weight [n, D] ([D, n] of o) and bias (or None) of a projection, as stored.

        Raises:
            CheckpointError: numbers that are not finite, or another shape than config.json describes.
        """
        module, rows = self.family.stored(projection, self.geometry)
        prefix = f"{self.family.attention_name(layer)}.{module}"
        whole, bias = self.reader[f"{prefix}.weight"], self.reader.get(f"{prefix}.bias")
        for name, tensor in (("weight", whole), ("bias", bias)):
            if tensor is not None and not torch.isfinite(tensor).all():
                raise CheckpointError(
                    f"{prefix}.{name} holds NaN or infinite numbers; the checkpoint is damaged, download it again"
                )
        weight = whole[rows]
        queries = self.geometry.num_heads * self.geometry.head_dim
        n, hidden = (self.geometry.kv_width if projection in ("k", "v") else queries), self.geometry.hidden_size
        if weight.shape != ((hidden, n) if projection == "o" else (n, hidden)) or (rows.stop or 0) > len(whole):
            raise CheckpointError(
                f"{prefix}.weight has shape {tuple(whole.shape)}, config.json asks for {n} outputs of {projection} in it and hidden size {hidden}"
            )
        return weight, None if bias is None else bias[rows]

    def stacked_weights(self, layer: int) -> Tensor:
        """W = [W_K ; W_V], [2n, D] float64."""
        return torch.cat([self.projection(layer, "k")[0].double(), self.projection(layer, "v")[0].double()])

    def attention(self, layer: int) -> AttentionWeights:
        """All projections of one attention, float64; weights of norms as they are stored."""
        stored = {part: self.projection(layer, part) for part in PROJECTIONS}
        q, k, v, o = (weight.double() for weight, _ in stored.values())
        q_bias, k_bias, v_bias, o_bias = (None if bias is None else bias.double() for _, bias in stored.values())
        q_norm, k_norm = (self._norm(layer, name) for name in (self.family.q_norm, self.family.k_norm))
        fused = self.family.qkv_proj is not None
        return AttentionWeights(
            q, k, v, o, q_bias, k_bias, v_bias, o_bias, q_norm=q_norm, k_norm=k_norm, fused=fused
        )  # fmt: skip

    def _norm(self, layer: int, name: str | None) -> Tensor | None:
        """Weight of a norm of queries or keys, float64; None without QK-norm."""
        return None if name is None else self.reader[f"{self.family.attention_name(layer)}.{name}.weight"].double()
