"""Streaming, token-weighted, mergeable moments of one layer's key and value outputs."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from care_mla.errors import CalibrationError

Sums = TypeVar("Sums", bound="MergeableSums")


@dataclass
class MergeableSums:
    """Sums that merge by addition."""

    def merge(self: Sums, other: Sums, scale: float = 1.0) -> Sums:
        """Sums of both; `other` weighted by `scale` (its token count is not).

        Raises:
            CalibrationError: one holds a sum that the other lacks.
        """
        merged: dict[str, Any] = {}
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if (mine is None) != (theirs is None):
                raise CalibrationError(f"cannot merge statistics: only one of them holds {field.name}")
            factor = 1.0 if field.name == "num_tokens" else scale
            merged[field.name] = None if mine is None else mine + factor * theirs
        return type(self)(**merged)

    def to_tensors(self) -> dict[str, Tensor]:
        """Named tensors for safetensors; an absent sum is left out."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}

    @classmethod
    def from_tensors(cls: type[Sums], tensors: dict[str, Tensor]) -> Sums:
        """Inverse of `to_tensors`."""
        return cls(**{field.name: tensors[field.name] for field in fields(cls) if field.name in tensors})


@dataclass
class Moments(MergeableSums):
    """Weighted sums over tokens, float64. y = [W_K x ; W_V x] without biases, before QK-norm and RoPE.

    Sums, not means, so that batches, corpora and processes merge by addition in any order.

    Attributes:
        weight: [], sum of token weights.
        num_tokens: [], tokens seen, whatever their weight.
        output_sum: [m], sum of w y, m = 2n for keys and values together.
        output_second: [m, m], sum of w y y^T.
        input_energy: [], sum of w ||x||^2.
        input_magnitude: [D], sum of w |x|.
        input_second: [D, D], sum of w x x^T; collected for care_c and low-rank queries alone.
    """

    weight: Float[Tensor, ""]
    num_tokens: Float[Tensor, ""]
    output_sum: Float[Tensor, "m"]
    output_second: Float[Tensor, "m m"]
    input_energy: Float[Tensor, ""]
    input_magnitude: Float[Tensor, "D"]
    input_second: Float[Tensor, "D D"] | None = None

    @classmethod
    def zeros(
        cls, output_width: int, input_width: int, *, with_inputs: bool = False, device: torch.device | None = None
    ) -> Moments:
        """Empty sums for outputs of width m and inputs of width D."""

        new = partial(torch.zeros, dtype=torch.float64, device=device)
        return cls(
            weight=new(()),
            num_tokens=new(()),
            output_sum=new(output_width),
            output_second=new(output_width, output_width),
            input_energy=new(()),
            input_magnitude=new(input_width),
            input_second=new(input_width, input_width) if with_inputs else None,
        )

    def update(
        self,
        inputs: Float[Tensor, "tokens D"],
        outputs: Float[Tensor, "tokens m"],
        token_weight: Float[Tensor, "tokens"] | None = None,
    ) -> None:
        """Add one batch of tokens. Padding must have been removed, or carry weight 0 (such tokens are not counted).

        Activations are brought to the sums' device as they are and widened there: theirs may have no float64. Nothing is
        squared in half precision, where 256^2 overflows.

        Raises:
            CalibrationError: a non-finite input or output; the sums are then unusable.
        """
        device = self.weight.device
        y = outputs.detach().to(device).double()
        x = inputs.detach().to(device)
        x = x if x.dtype in (torch.float32, torch.float64) else x.float()
        if token_weight is None:
            counted = torch.tensor(float(len(y)), dtype=torch.float64, device=device)
            weight, weighted_y, weighted_x = counted, y, x
        else:
            w = token_weight.to(device).double()
            counted, weight = (w > 0).sum().double(), w.sum()
            weighted_y, weighted_x = y * w[:, None], x * w[:, None].to(x.dtype)
        self.weight += weight
        self.num_tokens += counted
        self.output_sum += weighted_y.sum(0)
        self.output_second.addmm_(weighted_y.T, y)
        self.input_energy += (weighted_x * x).sum(dtype=torch.float64)
        self.input_magnitude += weighted_x.abs().sum(0, dtype=torch.float64)
        if self.input_second is not None:
            self.input_second.addmm_(weighted_x.double().T, x.double())
        if not bool(torch.isfinite(self.output_second.diagonal()).all() & torch.isfinite(self.input_energy)):
            raise CalibrationError("non-finite activations")

    def carrying(self, B: Float[Tensor, "m m"]) -> Moments:
        """The moments of B y."""
        return replace(self, output_sum=B @ self.output_sum, output_second=B @ self.output_second @ B.T)

    @property
    def second_moment(self) -> Float[Tensor, "m m"]:
        """E[y y^T]."""
        return self.output_second / self.weight

    @property
    def mean(self) -> Float[Tensor, "m"]:
        """E[y]."""
        return self.output_sum / self.weight

    @property
    def mean_input_energy(self) -> float:
        """lambda = E||x||^2 / D, the mean diagonal of the input second moment C."""
        return float(self.input_energy / self.weight) / len(self.input_magnitude)
