"""Latent attention: the source family's attention with keys and values rebuilt from cached latents."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from care_mla.families import FamilySpec
from care_mla.modeling.cache import LatentCache
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


class LatentAttention(nn.Module):
    """Replaces `self_attn` of a source layer; q_proj, o_proj and the norms are the source's own modules.

    What is cached is `kv_a_proj(x)`. Keys: k_b_proj, bias, QK-norm, RoPE at their cached positions. Values: v_b_proj, or,
    where that is cheaper, the attention weights are applied to the latents and v_b_proj to the result (exact: the map is
    linear and the weights sum to one).
    """

    def __init__(self, source: Any, rotary: Any, family: FamilySpec, config: CareMlaConfig, layer_idx: int):
        super().__init__()
        geometry = family.geometry(config.text_config.to_dict())
        self.config = source.config
        self.layer_idx = layer_idx
        self.layer_type = getattr(source, "layer_type", None)
        self.num_heads, self.num_kv_heads, self.head_dim = geometry.num_heads, geometry.num_kv_heads, geometry.head_dim
        # Read by transformers' attention functions:
        self.num_key_value_groups = geometry.num_heads // geometry.num_kv_heads
        self.scaling = source.scaling
        self.is_causal = True
        self.attention_dropout = source.attention_dropout
        self.attention_kwargs = {key: getattr(source, name, None) for key, name in family.attention_kwargs.items()}

        rank = config.kv_lora_rank[layer_idx]
        self.k_rank = rank if config.k_lora_rank is None else config.k_lora_rank[layer_idx]
        self.v_rank = rank if config.k_lora_rank is None else rank - self.k_rank
        self.q_proj = getattr(source, family.q_proj)
        self.o_proj = getattr(source, family.o_proj)
        self.q_norm = getattr(source, family.q_norm) if family.q_norm else nn.Identity()
        self.k_norm = getattr(source, family.k_norm) if family.k_norm else nn.Identity()
        self.kv_a_proj = nn.Linear(geometry.hidden_size, rank, bias=False)
        self.k_b_proj = nn.Linear(self.k_rank, geometry.kv_width, bias=config.k_bias)
        self.v_b_proj = nn.Linear(self.v_rank, geometry.kv_width, bias=config.v_bias)
        # The model's one rotary module and the family's eager function: used here, owned elsewhere (not submodules).
        self._rotary: Callable[..., tuple[Tensor, Tensor]]
        object.__setattr__(self, "_rotary", rotary)
        self._eager = sys.modules[type(source).__module__].eager_attention_forward
        # `_absorbed` is a plain softmax; a family that passes more (soft-cap, sinks) keeps its own attention function.
        self._plain_softmax = set(self.attention_kwargs) <= {"sliding_window"}

    def _heads(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        heads = x.view(*x.shape[:-1], -1, self.head_dim)
        return (norm(heads) if norm is not None else heads).transpose(1, 2)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: LatentCache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        queries = rotate(self._heads(self.q_proj(hidden_states), self.q_norm), *position_embeddings)
        latent = self.kv_a_proj(hidden_states)
        key_rotation = position_embeddings
        if past_key_values is not None:
            latent = past_key_values.append_latent(latent, self.layer_idx)
            key_rotation = past_key_values.rotation(
                lambda positions: self._rotary(hidden_states, position_ids=positions), latent.shape[1], self.layer_type
            )
        keys = rotate(self._heads(self.k_b_proj(latent[..., : self.k_rank]), self.k_norm), *key_rotation)
        value_latent = latent[..., latent.shape[-1] - self.v_rank :]

        num_queries = hidden_states.shape[1]
        implementation = self.config._attn_implementation
        absorb = absorbing_is_cheaper(num_queries, self.v_rank, self.num_heads, self.num_kv_heads, self.head_dim)
        if absorb and self._plain_softmax and implementation in ("eager", "sdpa") and not self.training:
            output, weights = self._absorbed(queries, keys, value_latent, attention_mask), None
        else:
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, self._eager)
            output, weights = attend(
                self,
                queries,
                keys,
                self._heads(self.v_b_proj(value_latent)),
                attention_mask,
                dropout=self.attention_dropout if self.training else 0.0,
                scaling=self.scaling,
                **self.attention_kwargs,
                **kwargs,
            )
        return self.o_proj(output.reshape(*hidden_states.shape[:2], -1)), weights

    def _absorbed(self, queries: Tensor, keys: Tensor, value_latent: Tensor, mask: Tensor | None) -> Tensor:
        """Attention in value-latent space; [batch, queries, n_h, d_h].

        Shapes: queries [b, n_h, q, d_h], keys [b, g_h, t, d_h], value_latent [b, t, R_v], mask broadcastable to [b, 1, q, t].
        """
        batch, _, num_queries, _ = queries.shape
        grouped = queries.reshape(batch, self.num_kv_heads, -1, self.head_dim)  # the heads of a group share its keys
        scores = (grouped @ keys.transpose(-1, -2)).view(batch, self.num_heads, num_queries, -1) * self.scaling
        if mask is not None:
            scores = (
                scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
            )
        elif num_queries > 1:
            past = scores.shape[-1] - num_queries
            causal = torch.ones(num_queries, scores.shape[-1], dtype=torch.bool, device=scores.device).tril(past)
            scores = scores.masked_fill(~causal, torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(queries.dtype)
        context = weights.view(batch, -1, weights.shape[-1]) @ value_latent  # [b, n_h * q, R_v]
        context = context.view(batch, self.num_kv_heads, -1, self.v_rank)
        up = self.v_b_proj.weight.view(self.num_kv_heads, self.head_dim, self.v_rank)
        output = context @ up.transpose(-1, -2)
        if self.v_b_proj.bias is not None:
            output = output + self.v_b_proj.bias.view(self.num_kv_heads, 1, self.head_dim)
        return output.view(batch, self.num_heads, num_queries, self.head_dim).transpose(1, 2)
