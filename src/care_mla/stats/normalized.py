"""Normalized queries and keys beside the layer's input: what linearized QK-norm is fitted to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from care_mla.errors import CalibrationError
from care_mla.stats.cross import CrossMoments
from care_mla.stats.fisher import FisherMoments

PARTS = {"queries": CrossMoments, "keys": CrossMoments, "fisher": FisherMoments}


def with_constant(x: Tensor) -> Tensor:
    """[x ; 1] for every token."""
    return torch.cat([x, x.new_ones(len(x), 1)], dim=1)


@dataclass
class NormalizedStatistics:
    """Sums of one layer with QK-norm, before RoPE.

    Attributes:
        queries: from [x ; 1] to the normalized queries, tokens as they count.
        keys: from [x ; 1] to the normalized keys; tokens count ||g|| times that where gradients were collected, as the outputs
            of `FisherMoments` do.
        fisher: of [normalized keys ; values]; None without gradients.
    """

    queries: CrossMoments
    keys: CrossMoments
    fisher: FisherMoments | None = None

    def to_tensors(self) -> dict[str, Tensor]:
        """Named tensors for safetensors."""
        parts = {name: getattr(self, name) for name in PARTS}
        return {
            f"{name}.{field}": tensor
            for name, part in parts.items()
            if part is not None
            for field, tensor in part.to_tensors().items()
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> NormalizedStatistics:
        """Inverse of `to_tensors`."""
        found = {
            name: {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
            for name in PARTS
        }
        queries, keys = CrossMoments.from_tensors(found["queries"]), CrossMoments.from_tensors(found["keys"])
        return cls(queries, keys, FisherMoments.from_tensors(found["fisher"]) if found["fisher"] else None)

    def require_fisher(self) -> FisherMoments:
        """The Fisher statistics.

        Raises:
            CalibrationError: not collected.
        """
        if self.fisher is None:
            raise CalibrationError(
                "these statistics of normalized keys hold no gradients; collect them with `care calibrate --normalized --fisher`, "
                "or choose --method care"
            )
        return self.fisher
