"""Layout `joint`: one latent for keys and values, RoPE kept whole. The least loss at a budget."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from care_mla.layouts.whole_rope import WholeRope
from care_mla.linalg import Factors


class Joint(WholeRope):
    """y = [keys ; values] is factorized as one: what they share is cached once."""

    name = "joint"
    blocks = ("kv",)

    def rows(self, kv_width: int) -> tuple[slice, ...]:
        return (slice(0, 2 * kv_width),)

    def up_projections(self, factors: Sequence[Factors], kv_width: int) -> tuple[Tensor, Tensor]:
        return factors[0].up[:kv_width], factors[0].up[kv_width:]


JOINT = Joint()
