"""Streaming Fisher statistics: what errors of each layer's key and value outputs cost the loss."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from care_mla.errors import CalibrationError
from care_mla.linalg import positive_inverse, shrink_to_isotropic, solve
from care_mla.stats.moments import MergeableSums

LEVERAGE_SHRINKAGE = 0.02
"""Of the second moment that weighs gradients; it only has to be invertible."""


@dataclass
class FisherMoments(MergeableSums):
    """Weighted sums over tokens, float64; g [m] is the gradient of the summed token loss at y, labels drawn from the model.

    The loss increase of replacing y by P y is E[(g^T (y - P y))^2] / 2 to second order. A Kronecker model of the fourth
    moment E[g g^T (x) y y^T] makes it tr(G (I-P) M (I-P)^T) / 2. Gradients and outputs are far from independent (the first
    token of a text has tiny keys and by far the largest gradients), so the factors are not the plain E[g g^T] and
    E[y y^T]: each is averaged with weights from the other, as in one step of the flip-flop fit of a matrix normal.

    Attributes:
        num_tokens: [], tokens seen.
        output_weight, output_sum, output_second: sums of ||g||, ||g|| y, ||g|| y y^T.
        gradient_weight, gradient_second: sums of v, v g g^T with v = y^T M^-1 y, M the second moment of all tokens.

    Source: K-FAC (arXiv 1503.05671) for the factorization; Dutilleul 1999 for the flip-flop. Differs from both in the
    square root of ||g||^2 as weight of the outputs, which did better on held-out text.
    """

    num_tokens: Float[Tensor, ""]
    output_weight: Float[Tensor, ""]
    output_sum: Float[Tensor, "m"]
    output_second: Float[Tensor, "m m"]
    gradient_weight: Float[Tensor, ""]
    gradient_second: Float[Tensor, "m m"]

    @classmethod
    def zeros(cls, output_width: int, *, device: torch.device | None = None) -> FisherMoments:
        """Empty sums for outputs of width m."""

        new = partial(torch.zeros, dtype=torch.float64, device=device)
        return cls(
            new(()),
            new(()),
            new(output_width),
            new(output_width, output_width),
            new(()),
            new(output_width, output_width),
        )

    @staticmethod
    def leverage_metric(second_moment: Float[Tensor, "m m"]) -> Float[Tensor, "m m"]:
        """M^-1 of the leverages v, M slightly shrunk.

        Args:
            second_moment: E[y y^T] of all tokens.

        Raises:
            CalibrationError: outputs that are all zero.
        """
        if not float(second_moment.diagonal().sum()) > 0:
            raise CalibrationError("outputs are all zero")
        return positive_inverse(
            shrink_to_isotropic(second_moment, LEVERAGE_SHRINKAGE), name="the second moment of the outputs"
        )

    def update(
        self,
        outputs: Float[Tensor, "tokens m"],
        gradients: Float[Tensor, "tokens m"],
        leverage_metric: Float[Tensor, "m m"],
        token_weight: Float[Tensor, "tokens"] | None = None,
    ) -> None:
        """Add one batch of tokens.

        Args:
            leverage_metric: see `leverage_metric`; the same for all batches.
            token_weight: [tokens], positive; None counts every token once.

        Raises:
            CalibrationError: non-finite gradients, or all of them zero.
        """
        # Batch products in the activations' own precision (at least float32), sums in float64: the sums are a metric whose
        # eigenvalues are damped by percents, and float64 products would cost as much as a forward pass.
        precision = torch.float64 if outputs.dtype == torch.float64 else torch.float32
        device = self.output_weight.device  # the activations' own may have no float64
        y, g = outputs.to(device).to(precision), gradients.to(device).to(precision)
        norms = g.square().sum(1).sqrt()
        total = float(norms.sum())
        if not total > 0 or total == float("inf"):
            raise CalibrationError("gradients are all zero" if total == 0 else "non-finite gradients")
        leverage = ((y @ leverage_metric.to(device).to(precision)) * y).sum(1)
        if token_weight is not None:
            w = token_weight.to(device).to(precision)
            norms, leverage = norms * w, leverage * w
        self.num_tokens += len(y)
        self.output_weight += norms.sum()
        self.output_sum += norms @ y
        self.output_second += (y * norms[:, None]).T @ y
        self.gradient_weight += leverage.sum()
        self.gradient_second += (g * leverage[:, None]).T @ g

    def carrying(self, B: Float[Tensor, "m m"]) -> FisherMoments:
        """The statistics of B y; an error of B y meets the gradients as an error of y would."""
        return replace(self, output_sum=B @ self.output_sum, output_second=B @ self.output_second @ B.T)

    @property
    def second_moment(self) -> Float[Tensor, "m m"]:
        """M: second moment of the outputs, weighted by the gradients' norms."""
        return self.output_second / self.output_weight

    @property
    def mean(self) -> Float[Tensor, "m"]:
        """mu: mean of the outputs under the same weights."""
        return self.output_sum / self.output_weight

    @property
    def metric(self) -> Float[Tensor, "m m"]:
        """G: second moment of the gradients, weighted by the outputs' leverage."""
        return self.gradient_second / self.gradient_weight

    def curvature(self, second_moment: Float[Tensor, "m m"]) -> Float[Tensor, "m m"]:
        """H = a G, scaled so that tr(H E M E^T) / 2 predicts the loss increase in nats per token of errors e = E y.

        The two factors of a Kronecker model share one scale. It is set where the statistics know the product: the average
        of ||g||^2 y^T R^-1 y, R the plain second moment, must come out as measured.

        Args:
            second_moment: E[y y^T] of all tokens, not shrunk.
        """
        plain = shrink_to_isotropic(second_moment, LEVERAGE_SHRINKAGE)
        leverage: Tensor = solve(plain, self.second_moment, name="the second moment of the outputs").diagonal().sum()
        return self.gradient_second / (self.num_tokens * leverage)
