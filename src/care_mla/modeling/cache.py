"""The latent cache: a DynamicCache whose layers hold latents, plus the token positions that rebuilt keys need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

CACHE_NAME = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"
"""What transformers calls the cache in arguments and outputs: `cache` from 5.24 on, `past_key_values` before."""


def cache_of(output: CausalLMOutputWithPast) -> DynamicCache:
    """The cache that a forward pass returned."""
    return cast(DynamicCache, getattr(output, CACHE_NAME))


class LatentCache(DynamicCache):
    """Per layer one tensor [batch, 1, tokens, cached width of the layer]; for the whole model one position per token.

    The latents sit in the `keys` slot of transformers' own cache layers with an empty `values` slot, so windows, beam
    reordering, cropping and offloading are transformers' code. Positions are kept because a key is rotated each time it
    is read, and neither padding nor packed prompts let them be guessed. Where frequencies depend on the length, cosines and
    sines are kept as well. Layout mla caches its rotary key turned, and needs none.
    """

    def __init__(self, config: PreTrainedConfig | None = None, **kwargs: Any):
        super().__init__(config=config.get_text_config(decoder=True) if config is not None else None, **kwargs)
        self.positions: Tensor | None = None
        self.kept: dict[str | None, tuple[Tensor, Tensor]] = {}
        self._rotations: dict[tuple[str | None, int, torch.device], tuple[Tensor, Tensor]] = {}

    def append_positions(self, tokens: Tensor, position_ids: Tensor | None) -> Tensor:
        """Remember where the tokens of this forward pass stand, and return it.

        Args:
            tokens: input ids or embeddings, [batch, new tokens, ...].
            position_ids: [batch or 1, new tokens]; None continues from the cached length, as transformers does.
        """
        batch_size, num_tokens = tokens.shape[:2]
        if position_ids is None:
            position_ids = self.get_seq_length() + torch.arange(num_tokens, device=tokens.device)[None]
        new = position_ids.to(torch.int32).expand(batch_size, -1)
        past = self.positions
        self.positions = new if past is None else torch.cat([past, new.to(past.device)], dim=1)
        self._rotations.clear()
        return position_ids

    def append_latent(self, latent: Tensor, layer_idx: int) -> Tensor:
        """Store [batch, tokens, R] and return the layer's latents so far (a window's worth, where the layer has one)."""
        nothing = latent.new_empty(*latent.shape[:2], 0).unsqueeze(1)
        latents, _ = self.update(latent.unsqueeze(1), nothing, layer_idx)
        return latents.squeeze(1)

    def rotation(
        self,
        rotary: Callable[[Tensor], tuple[Tensor, Tensor]],
        num_tokens: int,
        layer_type: str | None,
        device: torch.device,
    ) -> tuple[Tensor, Tensor]:
        """cos and sin [batch, num_tokens, d] of the last `num_tokens` cached tokens, computed once per forward pass and device.

        Args:
            rotary: positions -> cos and sin, where its module lives.
            device: of the layer that asks; layers of one model may be on several.
        """
        assert self.positions is not None
        positions = self.positions[:, -num_tokens:]
        return self._once((layer_type, num_tokens, device), lambda: rotary(positions.to(device)))

    def _once(
        self, key: tuple[str | None, int, torch.device], make: Callable[[], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """What `make` gives, on the device of the key; made once per forward pass."""
        if key not in self._rotations:
            cos, sin = make()
            self._rotations[key] = (cos.to(key[-1]), sin.to(key[-1]))
        return self._rotations[key]

    def kept_rotation(
        self, new: tuple[Tensor, Tensor], num_tokens: int, layer_type: str | None
    ) -> tuple[Tensor, Tensor]:
        """As `rotation`, where frequencies depend on the length: tokens keep the cos and sin they came with, as turned keys would.

        They are kept where the first layer is, and brought to the others once per forward pass.

        Args:
            new: cos and sin of this pass's tokens, [batch or 1, new tokens, d], on the device of the layer that asks.
        """
        assert self.positions is not None
        batch_size, length = self.positions.shape
        cos, sin = self.kept.get(layer_type, (None, None))
        if cos is None or sin is None or cos.shape[1] < length:  # the first layer of this pass brings them
            new_cos, new_sin = (
                part.expand(batch_size, -1, -1).to(part.device if cos is None else cos.device) for part in new
            )
            cos = new_cos if cos is None else torch.cat([cos, new_cos], dim=1)
            sin = new_sin if sin is None else torch.cat([sin, new_sin], dim=1)
            self.kept[layer_type] = (cos, sin)
        last = cos[:, -num_tokens:], sin[:, -num_tokens:]
        return self._once((layer_type, num_tokens, new[0].device), lambda: last)

    def _select(self, pick: Callable[[Tensor], Tensor]) -> None:
        if self.positions is not None:
            self.positions = pick(self.positions)
            self.kept = {name: (pick(cos), pick(sin)) for name, (cos, sin) in self.kept.items()}
        self._rotations.clear()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._select(lambda positions: positions.index_select(0, beam_idx.to(positions.device)))

    def crop(self, *args: Any, **kwargs: Any) -> None:
        super().crop(*args, **kwargs)
        self._select(lambda positions: positions[:, : self.get_seq_length()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._select(lambda positions: positions.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select(lambda positions: positions[indices.to(positions.device)])

    def reset(self) -> None:
        super().reset()
        self.positions = None
        self.kept.clear()
        self._rotations.clear()
