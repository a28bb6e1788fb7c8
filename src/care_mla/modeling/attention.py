"""What all attentions of converted models share: the source's queries, its attention function, and when to read latents as they are."""

from __future__ import annotations

import sys
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from care_mla.families import FamilySpec
from care_mla.geometry import Geometry
from care_mla.modeling.configuration import CareMlaConfig


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split RoPE of heads [batch, heads, tokens, d_h]; dimensions beyond the rotary width pass through."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    width = cos.shape[-1]
    rotary, rest = x[..., :width], x[..., width:]
    first, second = rotary.chunk(2, dim=-1)
    rotated = rotary * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated


def absorbing_is_cheaper(num_queries: int, rank: int, num_heads: int, num_kv_heads: int, head_dim: int) -> bool:
    """Whether weighting latents costs fewer multiplications per cached token than rebuilding its values first.

    Rebuilding: rank * g_h * d_h, then num_queries * n_h * d_h. Absorbed: num_queries * n_h * rank. True when decoding.
    """
    return num_queries * num_heads * rank < rank * num_kv_heads * head_dim + num_queries * num_heads * head_dim


class ConvertedAttention(nn.Module):
    """What the converted layouts share: the source attention's settings, its attention function, masked softmax weights."""

    def __init__(self, source: Any, family: FamilySpec, config: CareMlaConfig, layer_idx: int):
        super().__init__()
        self.geometry = geometry = family.geometry(config.text_config.to_dict())
        self.config = source.config
        self.layer_idx = layer_idx
        self.layer_type: Any = getattr(source, "layer_type", None)
        self.num_heads, self.num_kv_heads, self.head_dim = geometry.num_heads, geometry.num_kv_heads, geometry.head_dim
        # Read by transformers' attention functions:
        self.num_key_value_groups = geometry.num_heads // geometry.num_kv_heads
        self.scaling = source.scaling
        self.is_causal = True
        self.attention_dropout = source.attention_dropout
        self.attention_kwargs = {key: attrgetter(name)(source) for key, name in family.attention_kwargs.items()}
        self.has_sinks = family.sinks
        if family.sinks:
            self.sinks = source.sinks
        modeling = sys.modules[type(source).__module__]
        self._eager = modeling.eager_attention_forward
        self._rotate: Callable[..., tuple[Tensor, Tensor]] = modeling.apply_rotary_pos_emb
        # The absorbed paths are a plain softmax; a family with more (soft-cap, sinks) keeps its own attention function.
        self._plain_softmax = set(self.attention_kwargs) <= {"sliding_window"} and not family.sinks

    @staticmethod
    def _source_queries(source: Any, family: FamilySpec, geometry: Geometry) -> nn.Linear:
        """The source's query projection; a new module of its shape where q, k and v are one."""
        name, rows = family.stored("q", geometry)
        module: nn.Linear = getattr(source, name)
        if family.qkv_proj is None:
            return module
        return nn.Linear(module.in_features, rows.stop, bias=module.bias is not None)

    def _may_absorb(self, up: nn.Linear) -> bool:
        """Whether the absorbed path is the same attention; it reads the weight of `up`, which an offloaded module lacks between its calls."""
        known = self.config._attn_implementation in ("eager", "sdpa")
        return self._plain_softmax and known and not self.training and not up.weight.is_meta

    def _attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        sinks = {"s_aux": self.sinks} if self.has_sinks else {}
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self._eager)
        return attend(
            self,
            queries,
            keys,
            values,
            mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **self.attention_kwargs,
            **sinks,
            **kwargs,
        )

    @staticmethod
    def _weights(scores: Tensor, mask: Tensor | None) -> Tensor:
        """Softmax over the last dimension of float32 [b, n_h, q, t], masked or causal."""
        num_queries, lowest = scores.shape[-2], torch.finfo(scores.dtype).min
        if mask is not None:
            scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
        elif num_queries > 1:
            past = scores.shape[-1] - num_queries
            causal = torch.ones(num_queries, scores.shape[-1], dtype=torch.bool, device=scores.device).tril(past)
            scores = scores.masked_fill(~causal, lowest)
        return scores.softmax(dim=-1)
