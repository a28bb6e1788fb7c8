"""Attention of layouts joint and split: keys and values rebuilt from cached latents, in the source family's own attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from care_mla.families import FamilySpec
from care_mla.families.spec import LENGTH_DEPENDENT
from care_mla.modeling.attention import ConvertedAttention, absorbing_is_cheaper
from care_mla.modeling.cache import CACHE_NAME, LatentCache
from care_mla.modeling.configuration import CareMlaConfig


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
