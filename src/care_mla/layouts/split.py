"""Layout `split`: a latent for the keys and one for the values, RoPE kept whole. The paper's own (CARE, Sec. 3)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor

from care_mla.families.entries import malformed
from care_mla.layouts.base import LatentContent, Options
from care_mla.layouts.whole_rope import WholeRope
from care_mla.linalg import Factors


class Split(WholeRope):
    """Keys and values are factorized apart, under the diagonal blocks of the metric."""

    name = "split"
    blocks = ("k", "v")

    def rows(self, kv_width: int) -> tuple[slice, ...]:
        return slice(0, kv_width), slice(kv_width, 2 * kv_width)

    def up_projections(self, factors: Sequence[Factors], kv_width: int) -> tuple[Tensor, Tensor]:
        return factors[0].up, factors[1].up

    def config_entries(
        self,
        ranks: Sequence[Sequence[int]],
        biases: Collection[str],
        contents: Sequence[LatentContent],
        options: Options,
    ) -> dict[str, Any]:
        return super().config_entries(ranks, biases, contents, options) | {"k_lora_rank": [k for k, _ in ranks]}

    def require_entries(self, config: Any) -> None:
        super().require_entries(config)
        keys = config.k_lora_rank or []
        self.require_ranks("k_lora_rank", keys, config.num_hidden_layers)
        if any(k >= both for k, both in zip(keys, config.kv_lora_rank, strict=True)):
            raise malformed("k_lora_rank", config.k_lora_rank, "less than kv_lora_rank in every layer")


SPLIT = Split()
