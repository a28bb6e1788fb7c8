"""An accelerator that is not there: tensors that say they are on it, computed on the CPU, that may not be float64 nor meet the CPU's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

MPS = torch.device("mps")
_MOVES = (Tensor.to, Tensor.cpu)
_MAKERS = (torch.zeros, torch.ones, torch.empty, torch.full, torch.arange, torch.tensor, torch.eye, torch.rand)


class OnMps(torch.Tensor):
    """A tensor that says it is on `MPS`."""

    @property
    def device(self) -> torch.device:
        return MPS

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(function, types, args, kwargs or {})


def _checked(result: Any) -> Any:
    for tensor in result if isinstance(result, (tuple, list)) else (result,):
        if isinstance(tensor, OnMps):
            assert tensor.dtype != torch.float64, "a float64 tensor on a device without float64"
    return result


def _target(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device | None:
    """The device that a move or a maker names."""
    if function is Tensor.cpu:
        return torch.device("cpu")
    found = [a for a in (*args[1:], *kwargs.values()) if isinstance(a, (torch.device, str))] if args else []
    found += [a.device for a in args[1:] if isinstance(a, Tensor)] if function is Tensor.to else []
    found = found or ([kwargs["device"]] if kwargs.get("device") is not None else [])
    return torch.device(found[0]) if found else None


class Elsewhere(TorchFunctionMode):
    """While active, what is sent to `MPS` is an `OnMps`, and what comes back to the CPU is a plain tensor."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function in _MOVES:
            target = _target(function, args, kwargs)
            if target is not None:
                dtypes = [a for a in (*args[1:], *kwargs.values()) if isinstance(a, torch.dtype)]
                dtypes += [a.dtype for a in args[1:] if isinstance(a, Tensor)]
                there = args[0].as_subclass(OnMps if target.type == "mps" else Tensor)
                return _checked(there.to(dtypes[0]) if dtypes else there)
        elif function in _MAKERS and kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "mps":
            kwargs.pop("device")
            return _checked(function(*args, **kwargs).as_subclass(OnMps))
        return _checked(function(*args, **kwargs))


def send(model: nn.Module) -> nn.Module:
    """All parameters and buffers of a model say that they are on `MPS`."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().as_subclass(OnMps))
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = buffer.as_subclass(OnMps)
    return model
