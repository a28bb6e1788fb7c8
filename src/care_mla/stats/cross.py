"""Streaming cross moments of a linear map's inputs and the targets it is refitted to."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from care_mla.stats.moments import MergeableSums


@dataclass
class CrossMoments(MergeableSums):
    """Weighted sums over tokens, float64, of inputs a [m] and targets t [n].

    Attributes:
        num_tokens: [], tokens seen.
        weight: [], sum of token weights w.
        input_second: [m, m], sum of w a a^T.
        cross: [n, m], sum of w t a^T.
        target_energy: [], sum of w ||t||^2.
    """

    num_tokens: Float[Tensor, ""]
    weight: Float[Tensor, ""]
    input_second: Float[Tensor, "m m"]
    cross: Float[Tensor, "n m"]
    target_energy: Float[Tensor, ""]

    @classmethod
    def zeros(cls, input_width: int, target_width: int, *, device: torch.device | None = None) -> CrossMoments:
        """Empty sums."""

        new = partial(torch.zeros, dtype=torch.float64, device=device)
        return cls(new(()), new(()), new(input_width, input_width), new(target_width, input_width), new(()))

    def update(
        self,
        inputs: Float[Tensor, "tokens m"],
        targets: Float[Tensor, "tokens n"],
        token_weight: Float[Tensor, "tokens"],
    ) -> None:
        """Add one batch of tokens; products in the activations' own precision (at least float32), sums in float64.

        Both are made where the sums live: the activations' device may have no float64.
        """
        precision = torch.float64 if inputs.dtype == torch.float64 else torch.float32
        a, t, w = (part.to(self.weight.device).to(precision) for part in (inputs, targets, token_weight))
        self.num_tokens += len(a)
        self.weight += w.sum()
        self.input_second += (a * w[:, None]).T @ a
        self.cross += (t * w[:, None]).T @ a
        self.target_energy += w @ t.square().sum(1)

    def relative_error(self, W: Float[Tensor, "n m"]) -> float:
        """E||t - W a||^2 / E||t||^2 under the token weights."""
        explained = 2.0 * (W * self.cross).sum() - ((W @ self.input_second) * W).sum()
        return float(1.0 - explained / self.target_energy)
