"""What layouts joint and split share: RoPE kept whole. Latents are cached; keys are rebuilt, biased, normalized and rotated when read.

Tensors of one attention module (R the layer's cached width, n = g_h d_h):
    kv_a_proj.weight [R, D]    x -> latents, all blocks stacked
    k_b_proj.weight  [n, R_k]  key latent -> keys (R_k = R when joint), bias [n] = the source's and what centring gives back
    v_b_proj.weight  [n, R_v]  value latent -> values
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from care_mla.geometry import Geometry
from care_mla.layouts.base import AttentionWeights, DenseProjections, LatentContent, Layout, Options, SourceFacts
from care_mla.layouts.features import WHOLE_ROPE_KEEPS
from care_mla.layouts.losses import reconstruction_error
from care_mla.linalg import Factors


class WholeRope(Layout):
    """A layout whose keys are rebuilt whole: every feature of a source is kept, and output projections can be refitted."""

    keeps = WHOLE_ROPE_KEEPS
    refuses: ClassVar[Mapping[str, str]] = {}
    options = frozenset({"refit", "refit_tokens", "refit_ridge"})
    attention = "care_mla.modeling.latent_attention:LatentAttention"
    caches_positions = True

    def acting(self, facts: SourceFacts, options: Options) -> frozenset[str]:
        return self.options if options["refit"] else frozenset({"refit"})

    @abstractmethod
    def up_projections(self, factors: Sequence[Factors], kv_width: int) -> tuple[Tensor, Tensor]:
        """k_b_proj [n, R_k] and v_b_proj [n, R_v]."""

    def tensors(
        self,
        weights: AttentionWeights,
        factors: Sequence[Factors],
        content: LatentContent,
        mean: Tensor | None,
        geometry: Geometry,
        queries: Factors | None = None,
    ) -> dict[str, Tensor]:
        """As `Layout.tensors`; queries stay the source's."""
        assert queries is None
        k_bias, v_bias = weights.k_bias, weights.v_bias
        rows = self.rows(geometry.kv_width)
        if mean is not None:
            kept_keys, kept_values = (reconstruction_error(factors, len(mean), rows=rows) @ mean).chunk(2)
            k_bias = kept_keys if k_bias is None else k_bias + kept_keys
            v_bias = kept_values if v_bias is None else v_bias + kept_values
        W = weights.keys_and_values
        k_up, v_up = self.up_projections(factors, geometry.kv_width)
        tensors = {
            "kv_a_proj.weight": torch.cat([f.encode @ W[block] for f, block in zip(factors, rows, strict=True)]),
            "k_b_proj.weight": k_up,
            "v_b_proj.weight": v_up,
        }
        biases = {"k_b_proj.bias": k_bias, "v_b_proj.bias": v_bias}
        if weights.fused:
            tensors["q_proj.weight"], biases["q_proj.bias"] = weights.q, weights.q_bias
        return tensors | {name: bias for name, bias in biases.items() if bias is not None}


def dense_projections(tensors: Mapping[str, Tensor]) -> DenseProjections:
    """The low-rank edit of the source's weights that `WholeRope.tensors` stand for."""
    down, k_up, v_up = (tensors[f"{name}.weight"] for name in ("kv_a_proj", "k_b_proj", "v_b_proj"))
    return DenseProjections(
        k=k_up @ down[: k_up.shape[1]],
        v=v_up @ down[-v_up.shape[1] :],
        k_bias=tensors.get("k_b_proj.bias"),
        v_bias=tensors.get("v_b_proj.bias"),
    )
