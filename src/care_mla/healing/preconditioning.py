"""Coordinates in which training the factors is well conditioned.

A layer's directions differ in what a change of them costs by many orders of magnitude: inputs have a few loud dimensions, and
the loss is far steeper in some outputs than in others. An optimizer that moves all weights alike (Adam) is held back by the
steepest. To second order, changing W by D costs KL ~ 1/2 tr(G D C D^T) per token, with C = E[x x^T] of the layer's inputs and
G = E[g g^T] of the loss's gradients at its outputs (Kronecker-factored Fisher; Martens & Grosse 2015, arXiv 1503.05671). So

    W = W_0 + G^{-1/2} V C^{-1/2},    KL ~ 1/2 |V|^2

and V, from zero, is what trains.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

DAMPING = 1e-2
"""Share of isotropic noise in both moments."""


class Preconditioned(nn.Module):
    """Parametrization of a weight [out, in] or a bias [out]: base + left @ V (@ right)."""

    def __init__(self, base: Tensor, inputs: int | None):
        super().__init__()
        self.register_buffer("base", base.detach().clone())
        self.register_buffer("left", torch.eye(len(base), dtype=base.dtype, device=base.device))
        right = None if inputs is None else torch.eye(inputs, dtype=base.dtype, device=base.device)
        self.register_buffer("right", right)

    def forward(self, change: Tensor) -> Tensor:
        with torch.autocast(change.device.type, enabled=False):
            moved = self.left @ change
            return self.base + (moved if self.right is None else moved @ self.right)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return torch.zeros_like(weight)


def precondition(module: nn.Module) -> list[nn.Linear]:
    """Put the trained weights of linear layers under `Preconditioned`, for now with identities; the layers."""
    found = [m for m in module.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad]
    for linear in found:
        parametrize.register_parametrization(linear, "weight", Preconditioned(linear.weight, linear.in_features))
        if linear.bias is not None and linear.bias.requires_grad:
            parametrize.register_parametrization(linear, "bias", Preconditioned(linear.bias, None))
    return found


@contextmanager
def moments(layers: list[nn.Linear]) -> Iterator[list[tuple[Tensor, Tensor, list[int]]]]:
    """Sums of x x^T and of g g^T at every layer while passes run, and the number of tokens."""
    found = []
    handles = []
    for layer in layers:
        C = torch.zeros(layer.in_features, layer.in_features, device=layer.weight.device)
        G = torch.zeros(layer.out_features, layer.out_features, device=layer.weight.device)
        count = [0]
        found.append((C, G, count))

        def forward(
            module: nn.Module,
            inputs: tuple[Tensor, ...],
            output: Tensor,
            C: Tensor = C,
            count: list[int] = count,
            G: Tensor = G,
        ) -> None:
            x = inputs[0].detach().flatten(0, -2).float()
            C.addmm_(x.T, x)
            count[0] += len(x)

            def backward(gradient: Tensor) -> None:
                g = gradient.flatten(0, -2).float()
                G.addmm_(g.T, g)

            output.register_hook(backward)

        handles.append(layer.register_forward_hook(forward))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
