"""Latent attention: the source family's attention with keys and values rebuilt from cached latents."""

from __future__ import annotations

import sys
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from care_mla.families import FamilySpec
from care_mla.families.spec import LENGTH_DEPENDENT
from care_mla.geometry import Geometry
from care_mla.modeling.cache import CACHE_NAME, LatentCache
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


class LatentAttention(ConvertedAttention):
    """Replaces `self_attn` of a source layer; q_proj, o_proj and the norms are the source's own modules.

    What is cached is `kv_a_proj(x)`. Keys: k_b_proj, bias, QK-norm, RoPE at their cached positions. Values: v_b_proj, or,
    where that is cheaper, the attention weights are applied to the latents and v_b_proj to the result (exact: the map is
    linear and the weights sum to one).
    """

    def __init__(self, source: Any, rotary: Any, family: FamilySpec, config: CareMlaConfig, layer_idx: int):
        super().__init__(source, family, config, layer_idx)
        rank, kv_width = config.kv_lora_rank[layer_idx], self.num_kv_heads * self.head_dim
        self.k_rank = rank if config.k_lora_rank is None else config.k_lora_rank[layer_idx]
        self.v_rank = rank if config.k_lora_rank is None else rank - self.k_rank
        # Under the family's own names: checkpoints keep them.
        self._q_proj, self._o_proj = family.q_proj, family.o_proj
        queries = self._source_queries(source, family, self.geometry)
        self.add_module(self._q_proj, queries)
        self.add_module(self._o_proj, getattr(source, family.o_proj))
        self._q_norm, self._k_norm = family.q_norm, family.k_norm
        for norm in filter(None, (family.q_norm, family.k_norm)):
            self.add_module(norm, getattr(source, norm))
        self.norm_over_heads = family.qk_norm_over == "head"
        self.turns = bool(getattr(source, family.use_rope)) if family.use_rope else True
        self.kv_a_proj = nn.Linear(queries.in_features, rank, bias=False)
        self.k_b_proj = nn.Linear(self.k_rank, kv_width, bias=config.k_bias)
        self.v_b_proj = nn.Linear(self.v_rank, kv_width, bias=config.v_bias)
        self.rope_layer_type = self.layer_type if family.rope_by_layer_type else None
        rope_type = getattr(rotary, "rope_type", "default")
        rope_type = rope_type[self.layer_type] if family.rope_by_layer_type else rope_type
        self.rope_depends_on_length = rope_type in LENGTH_DEPENDENT
        # The model's one rotary module: used here, owned elsewhere (not a submodule).
        self._rotary: Callable[..., tuple[Tensor, Tensor]]
        object.__setattr__(self, "_rotary", rotary)

    def _heads(self, x: Tensor, norm: str | None = None) -> Tensor:
        """[b, t, heads * d_h] -> [b, heads, t, d_h], normalized as the family does it."""
        if norm is not None and not self.norm_over_heads:
            x = getattr(self, norm)(x)
        heads = x.view(*x.shape[:-1], -1, self.head_dim)
        return (getattr(self, norm)(heads) if norm is not None and self.norm_over_heads else heads).transpose(1, 2)

    def _turned(self, heads: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """RoPE as the family's own function has it; it takes queries and keys, whose positions differ here, so one is empty."""
        return self._rotate(heads, heads[:, :0], *rotation)[0] if self.turns else heads

    def _key_rotation(self, x: Tensor, new: tuple[Tensor, Tensor], cache: LatentCache, num_tokens: int) -> Any:
        """cos and sin of the last cached tokens, given those of the new ones."""
        if not self.turns:
            return new
        if self.rope_depends_on_length:
            return cache.kept_rotation(new, num_tokens, self.rope_layer_type)
        more = (self.rope_layer_type,) if self.rope_layer_type is not None else ()
        return cache.rotation(
            lambda positions: self._rotary(x, positions, *more), num_tokens, self.rope_layer_type, x.device
        )

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        cache: LatentCache | None = kwargs.pop(CACHE_NAME, None)
        projected = getattr(self, self._q_proj)(hidden_states)
        queries = self._turned(self._heads(projected, self._q_norm), position_embeddings)
        latent = self.kv_a_proj(hidden_states)
        key_rotation = position_embeddings
        if cache is not None:
            latent = cache.append_latent(latent, self.layer_idx)
            key_rotation = self._key_rotation(hidden_states, position_embeddings, cache, latent.shape[1])
        rebuilt = self.k_b_proj(latent[..., : self.k_rank])
        keys = self._turned(self._heads(rebuilt, self._k_norm), key_rotation)
        value_latent = latent[..., latent.shape[-1] - self.v_rank :]

        num_queries = hidden_states.shape[1]
        absorb = absorbing_is_cheaper(num_queries, self.v_rank, self.num_heads, self.num_kv_heads, self.head_dim)
        if absorb and self._may_absorb(self.v_b_proj):
            output, weights = self._absorbed(queries, keys, value_latent, attention_mask), None
        else:
            values = self._heads(self.v_b_proj(value_latent))
            output, weights = self._attend(queries, keys, values, attention_mask, **kwargs)
        return getattr(self, self._o_proj)(output.reshape(*hidden_states.shape[:2], -1)), weights

    def _absorbed(self, queries: Tensor, keys: Tensor, value_latent: Tensor, mask: Tensor | None) -> Tensor:
        """Attention in value-latent space; [batch, queries, n_h, d_h].

        In float32 from the queries to the output, as the source's fused attention adds up: scores, weights or contexts
        that are rounded on the way would make decoding in bfloat16 noisier than the source's.

        Shapes: queries [b, n_h, q, d_h], keys [b, g_h, t, d_h], value_latent [b, t, R_v], mask broadcastable to [b, 1, q, t].
        """
        batch, _, num_queries, _ = queries.shape
        grouped = queries.reshape(batch, self.num_kv_heads, -1, self.head_dim)  # the heads of a group share its keys
        scores = grouped.float() @ keys.float().transpose(-1, -2)
        weights = self._weights(scores.view(batch, self.num_heads, num_queries, -1) * self.scaling, mask)
        context = weights.view(batch, -1, weights.shape[-1]) @ value_latent.float()  # [b, n_h * q, R_v]
        context = context.view(batch, self.num_kv_heads, -1, self.v_rank)
        up = self.v_b_proj.weight.float().view(self.num_kv_heads, self.head_dim, self.v_rank)
        output = context @ up.transpose(-1, -2)
        if self.v_b_proj.bias is not None:
            output = output + self.v_b_proj.bias.float().view(self.num_kv_heads, 1, self.head_dim)
        output = output.view(batch, self.num_heads, num_queries, self.head_dim).transpose(1, 2)
        return output.to(queries.dtype)


class MlaAttention(ConvertedAttention):
    """DeepSeek's attention: a latent for position-free keys and values, and one rotary key shared by all heads.

    What is cached is the latent and the rotary key, already turned. The rotary pairs turn at chosen frequencies of the
    source's own rotary module (`rope_frequencies`), so every kind of RoPE scaling is the model's own. With QK-norm one scale
    a kv head is cached too, see `layouts.mla`. With `q_lora_rank` queries are q_b_proj(q_a_proj(x)).
    """

    def __init__(self, source: Any, rotary: Any, family: FamilySpec, config: CareMlaConfig, layer_idx: int):
        super().__init__(source, family, config, layer_idx)
        assert config.rope_frequencies is not None
        self.rank, self.frequencies = config.kv_lora_rank[layer_idx], config.rope_frequencies[layer_idx]
        self.num_key_value_groups = 1
        rope_width = 2 * len(self.frequencies)
        q_proj, o_proj = self._source_queries(source, family, self.geometry), getattr(source, family.o_proj)
        width, heads, d = q_proj.in_features, self.num_heads, self.head_dim
        self._q_proj, self._o_proj = family.q_proj, family.o_proj
        self.normalized = family.k_norm is not None and config.qk_norm == "exact"
        if self.normalized:
            assert family.q_norm is not None and family.k_norm is not None
            query_width = q_proj.out_features
            self._q_norm, self._k_norm = family.q_norm, family.k_norm
            self.add_module(self._q_norm, getattr(source, family.q_norm))
            self.add_module(self._k_norm, getattr(source, family.k_norm))
            self.k_proj = getattr(source, family.k_proj)
            self.q_rope = nn.Linear(d, self.num_kv_heads * rope_width, bias=False)
            self.k_constant = nn.Parameter(torch.zeros(self.num_kv_heads * d))
        else:
            query_width = heads * (d + rope_width)
        self.kv_a_proj_with_mqa = nn.Linear(width, self.rank + rope_width, bias=config.k_bias)
        self.kv_b_proj = nn.Linear(self.rank, heads * 2 * d, bias=False)
        if config.q_lora_rank is not None:
            self._q_proj = "q_b_proj"
            self.q_a_proj = nn.Linear(width, config.q_lora_rank, bias=False)
        self.low_rank_queries = config.q_lora_rank is not None
        query_inputs = width if config.q_lora_rank is None else config.q_lora_rank
        q_bias = q_proj.bias is not None if config.q_bias is None else config.q_bias
        self.add_module(self._q_proj, nn.Linear(query_inputs, query_width, bias=q_bias))
        self.add_module(self._o_proj, nn.Linear(heads * d, o_proj.out_features, bias=config.o_bias))
        # cos and sin carry YaRN's attention factor; the position-free part of a score needs its square too.
        self.position_free_scale = getattr(rotary, "attention_scaling", 1.0) ** 2

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        cache: LatentCache | None = kwargs.pop(CACHE_NAME, None)
        batch, num_queries, _ = hidden_states.shape
        d = self.head_dim
        cos, sin = (part[..., self.frequencies].repeat(1, 1, 2) for part in position_embeddings)
        free, rotary = self._queries(hidden_states)
        free, rotary = free * self.position_free_scale, rotate(rotary, cos, sin)
        cached = self.kv_a_proj_with_mqa(hidden_states)
        turned = rotate(cached[:, None, :, self.rank :], cos, sin)[:, 0]
        cached = torch.cat([cached[..., : self.rank], turned, *self._key_scales(hidden_states)], dim=-1)
        if cache is not None:
            cached = cache.append_latent(cached, self.layer_idx)
        latent, rotary_key, scales = cached.split(
            [self.rank, turned.shape[-1], cached.shape[-1] - self.rank - turned.shape[-1]], dim=-1
        )

        # Per cached token and head: rebuilding costs 2d R, then 2d + 2P for each query; absorbed, 2R + 2P for each query.
        if num_queries * 2 * self.rank < 2 * d * self.rank + num_queries * 2 * d and self._may_absorb(self.kv_b_proj):
            output, weights = self._absorbed(free, rotary, latent, rotary_key, scales, attention_mask), None
        else:
            rebuilt = self.kv_b_proj(latent).view(batch, latent.shape[1], self.num_heads, 2 * d).transpose(1, 2)
            position_free, values = rebuilt.split(d, dim=-1)
            shared = rotary_key[:, None].expand(-1, self.num_heads, -1, -1)
            if self.normalized:
                scale = self._per_head(scales.transpose(1, 2)[..., None])
                position_free = (position_free + self._per_head(self.k_constant.view(1, -1, 1, d))) * scale
                shared = shared * scale
            keys = torch.cat([position_free, shared], dim=-1)
            output, weights = self._attend(torch.cat([free, rotary], dim=-1), keys, values, attention_mask, **kwargs)
        return getattr(self, self._o_proj)(output.reshape(batch, num_queries, -1)), weights

    def _absorbed(
        self,
        free: Tensor,
        rotary: Tensor,
        latent: Tensor,
        rotary_key: Tensor,
        scales: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        """Attention in latent space; [batch, queries, n_h, d]. In float32 from the queries to the output.

        Shapes: free [b, n_h, q, d], rotary [b, n_h, q, 2P], latent [b, t, R], rotary_key [b, t, 2P], scales [b, t, g or 0].
        """
        d, wide = self.head_dim, latent[:, None].float()
        up = self.kv_b_proj.weight.float().view(self.num_heads, 2 * d, self.rank)
        scores = (free.float() @ up[:, :d]) @ wide.transpose(-1, -2)
        scores = scores + rotary.float() @ rotary_key[:, None].float().transpose(-1, -2)
        if self.normalized:
            scores = scores + free.float() @ self._per_head(self.k_constant.float().view(1, -1, d, 1))
            scores = scores * self._per_head(scales.float().transpose(1, 2)[:, :, None])
        context = self._weights(scores * self.scaling, mask) @ wide
        return (context @ up[:, d:].transpose(-1, -2)).transpose(1, 2).to(free.dtype)

    def _queries(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Position-free [b, n_h, q, d] and rotary [b, n_h, q, 2P] queries, neither turned yet."""
        inputs = self.q_a_proj(hidden_states) if self.low_rank_queries else hidden_states
        heads = getattr(self, self._q_proj)(inputs).view(*inputs.shape[:2], self.num_heads, -1).transpose(1, 2)
        if not self.normalized:
            return heads[..., : self.head_dim], heads[..., self.head_dim :]
        heads = getattr(self, self._q_norm)(heads)
        weight = self.q_rope.weight
        if weight.is_meta:  # offloaded: only a call brings it, and a call on the identity gives its transpose, exactly
            weight = self.q_rope(torch.eye(self.head_dim, dtype=heads.dtype, device=heads.device)).T
        maps = weight.reshape(self.num_kv_heads, -1, self.head_dim)
        return heads, heads @ self._per_head(maps[None]).transpose(-1, -2)

    def _key_scales(self, hidden_states: Tensor) -> list[Tensor]:
        """1 / rms of every kv head's keys [b, tokens, g], none without QK-norm."""
        if not self.normalized:
            return []
        keys = self.k_proj(hidden_states)
        heads = keys.view(*keys.shape[:-1], self.num_kv_heads, self.head_dim).float()
        return [(heads.square().mean(-1) + getattr(self, self._k_norm).variance_epsilon).rsqrt().to(keys.dtype)]

    def _per_head(self, by_group: Tensor) -> Tensor:
        """[b, g, ...] -> [b, n_h, ...]: the heads of a group share what is its kv head's."""
        return by_group.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)
