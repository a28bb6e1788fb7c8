"""Attention of layout mla: DeepSeek's, with the rotary module and norms of the source."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from care_mla.families import FamilySpec
from care_mla.modeling.attention import ConvertedAttention, rotate
from care_mla.modeling.cache import CACHE_NAME, LatentCache
from care_mla.modeling.configuration import CareMlaConfig


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
