"""Coordinates in which the factors train well, and a learning rate that means the same in every layer and model.

Latents keep the scale of what they encode, and keys are far larger than values: of two latent directions, one may be a thousand
times larger than the other. Adam moves every weight by the same amount, so the largest latent decides which rate is still
stable, and the small ones hardly move. With x the inputs of a factor and y its outputs, C = E[x x^T], over a few blocks,

    down-projection:  A = A_0 + Q S^{1/2} V diag(E[x_i^2])^{-1/2} / sqrt(D)    E[y y^T] = Q S Q^T
    up-projection:    B = B_0 + rms(y) V S^{-1/2} Q^T / sqrt(r)                C = Q S Q^T

train V, from zero: latents have unit variance and no correlation in these coordinates, and a step of Adam with rate `lr` changes
what a factor gives by about the share `lr`. (A diagonal, data-dependent form of Shampoo's and SOAP's change of basis; arXiv
1802.09568, 2409.11321.) Other weights are moved by `lr` times their own root mean square (as in Adafactor, arXiv 1804.04235).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from care_mla.files import write_tensors
from care_mla.healing.processes import on_main
from care_mla.healing.student import DOWN_FACTORS, KV_FACTORS
from care_mla.linalg import symmetric_eigen

SMALLEST = 1e-6
"""Of the variances of a latent, relative to the largest: those below are taken to be so large."""
QUIETEST = 0.1
"""Of the root mean squares of inputs, relative to their mean."""
ORIGINAL = ".parametrizations.{}.original"
"""How `torch.nn.utils.parametrize` names what trains in place of a weight or bias."""


class Preconditioned(nn.Module):
    """Parametrization of a weight [out, in] or bias [out]: base + left V right, each factor a matrix, its diagonal or one number."""

    base: Tensor
    left: Tensor
    right: Tensor

    def __init__(self, base: Tensor, left: Tensor, right: Tensor):
        super().__init__()
        self.register_buffer("base", base.detach().float().clone())
        self.register_buffer("left", left.to(self.base))
        self.register_buffer("right", right.to(self.base))

    def forward(self, change: Tensor) -> Tensor:
        with torch.autocast(change.device.type, enabled=False):
            moved = self.left @ change if self.left.ndim == 2 else self.left * change
            return self.base + (moved @ self.right if self.right.ndim == 2 else moved * self.right)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return torch.zeros_like(weight, dtype=torch.float32)


def factors(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers of keys and values that train, by name."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in KV_FACTORS and module.weight.requires_grad:
            yield name, module


@torch.no_grad()
def scales(model: nn.Module, run: Callable[[], None]) -> dict[str, Tensor]:
    """left and right of every factor, by "name.left" and "name.right".

    Args:
        run: passes of the model over some text.
    """
    sums: dict[str, list[Tensor]] = {}

    def measuring(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            down = name.rpartition(".")[2] in DOWN_FACTORS
            x, y = (t.detach().flatten(0, -2).double() for t in (inputs[0], output))
            latent, other = (y, x) if down else (x, y)
            found = [latent.T @ latent, other.square().sum(0), torch.tensor(len(x))]
            sums[name] = [a + b for a, b in zip(sums[name], found, strict=True)] if name in sums else found

        return hook

    handles = [module.register_forward_hook(measuring(name)) for name, module in factors(model)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    result: dict[str, Tensor] = {}
    for name, (moment, squares, count) in sums.items():
        variances, Q = symmetric_eigen(moment / count, name=f"the second moment of the latents of {name}")
        variances = variances.clamp_min(SMALLEST * variances.max().clamp_min(1e-30))
        rms = (squares / count).sqrt()
        if name.rpartition(".")[2] in DOWN_FACTORS:
            left = Q * variances.sqrt()
            right = 1.0 / (rms.clamp_min(QUIETEST * rms.mean().clamp_min(1e-30)) * len(rms) ** 0.5)
        else:
            left = rms.square().mean().sqrt().clamp_min(1e-30)
            right = (Q / variances.sqrt()).T / len(Q) ** 0.5
        result |= {f"{name}.{side}": t.float().cpu().contiguous() for side, t in (("left", left), ("right", right))}
    return result


def precondition(model: nn.Module, path: Path, run: Callable[[], None]) -> None:
    """Put all factors that train into the coordinates above; measured once by the main process, and read by all that follow.

    Args:
        path: where the scales are kept, or are from an earlier start of this run.
        run: passes of the model over some text.
    """

    def measure() -> None:
        if not path.is_file():
            write_tensors(path, scales(model, run))

    on_main(measure)
    found = load_file(path)
    for name, module in list(factors(model)):
        left, right = found[f"{name}.left"], found[f"{name}.right"]
        parametrize.register_parametrization(module, "weight", Preconditioned(module.weight, left, right))
        if module.bias is not None and module.bias.requires_grad:
            one = torch.ones(())
            parametrize.register_parametrization(module, "bias", Preconditioned(module.bias, left, one))


def parameter_groups(module: nn.Module) -> list[dict[str, object]]:
    """What trains, as groups of an optimizer; `scale` is what the learning rate is multiplied by."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            own = name.endswith(tuple(ORIGINAL.format(kind) for kind in ("weight", "bias")))
            scale = 1.0 if own else float(parameter.detach().square().mean().sqrt()) or 1.0
            groups.setdefault(scale, []).append(parameter)
    return [{"params": parameters, "scale": scale} for scale, parameters in groups.items()]


def own_weights(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Trained weights by their own names, out of the coordinates above."""
    result = {}
    for name, tensor in state.items():
        for kind in ("weight", "bias"):
            module, found, _ = name.partition(ORIGINAL.format(kind))
            if found:
                parametrization = model.get_submodule(f"{module}.parametrizations.{kind}.0")
                assert isinstance(parametrization, Preconditioned)
                result[f"{module}.{kind}"] = parametrization(tensor.to(parametrization.base.device)).cpu()
                break
        else:
            result[name] = tensor
    return result
