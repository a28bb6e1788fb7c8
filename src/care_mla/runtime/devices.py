"""The one place that says what --device and --dtype mean, for the CLI and for Python."""

from __future__ import annotations

import re
import warnings
from typing import Literal

import torch

from care_mla.config.dtypes import named_dtype
from care_mla.errors import ConfigError

ACCELERATORS = ("cuda", "xpu", "mps")
"""In the order in which they are looked for where none is named."""
_ANY = ("auto",)
_ANY_ACCELERATOR = ("gpu", "accelerator")


# --- devices ----------------------------------------------------------------------------------------------------------


def resolve_device(device: str | int | torch.device | None = None, *, option: str = "--device") -> torch.device:
    """What a device is called -> a device that works.

    Args:
        device: "cpu", "cuda", "cuda:1", "xpu", "mps" or a torch.device; None or "auto": the accelerator there is, else the CPU;
            "gpu": the accelerator there is; a number: that one of the accelerators.
        option: how the message calls it.

    Raises:
        ConfigError: unknown, or not there.
    """
    word = str(device if device is not None else "auto").strip().lower()
    if isinstance(device, bool) or not isinstance(device, (str, int, torch.device, type(None))):
        raise ConfigError(f"{option} {device!r}: a device is {_choices()}")
    found = _accelerator()
    if word in _ANY:
        return _working(found, option) if found is not None else torch.device("cpu")
    if word in _ANY_ACCELERATOR or word.isdecimal():
        if found is None:
            raise ConfigError(f"{option} {device}: torch finds no accelerator here{_build()}; use {option} cpu")
        word = found.type + (f":{int(word)}" if word.isdecimal() else "")
    match = re.fullmatch(r"([a-z]+)(?::(\d+))?", word)
    if match is None or match[1] not in ("cpu", *ACCELERATORS):
        raise ConfigError(f"{option} {str(device)!r}: a device is {_choices()}")
    kind, index = match[1], None if match[2] is None else int(match[2])
    if kind == "cpu":
        if index:
            raise ConfigError(f"{option} {device}: there is one cpu; use {option} cpu")
        return torch.device("cpu")
    count, reason = _count(kind)
    if not count:
        instead = f"cpu or {found.type}" if found is not None else "cpu"
        raise ConfigError(f"{option} {device}: torch finds no {kind} device here{reason}; use {option} {instead}")
    if index is not None and index >= count:
        there = f"is {kind}:0 alone" if count == 1 else f"are {kind}:0 to {kind}:{count - 1}"
        raise ConfigError(f"{option} {device}: there {there}")
    return _working(torch.device(kind) if index is None else torch.device(kind, index), option)


def has_float64(device: torch.device) -> bool:
    """Whether a device has double precision."""
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    return device.type != "mps"


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 in hardware."""
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "xpu" and torch.xpu.is_bf16_supported()


def sums_device(device: torch.device) -> torch.device:
    """Where sums over activations of a device live: there, or on the CPU if it has no float64."""
    return device if has_float64(device) else torch.device("cpu")


def _choices() -> str:
    return f"cpu, {', '.join(ACCELERATORS)}, one of several as cuda:1, or auto"


def _accelerator() -> torch.device | None:
    """The first kind of accelerator there is."""
    return next((torch.device(kind) for kind in ACCELERATORS if _count(kind)[0]), None)


def _count(kind: str) -> tuple[int, str]:
    """How many accelerators of a kind there are, and, where none, why."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")  # torch warns of drivers, once
        if kind == "mps":
            return (1, "") if torch.backends.mps.is_available() else (0, _build())
        module = getattr(torch, kind)
        count = module.device_count() if module.is_available() else 0
    reason = str(said[0].message).strip().splitlines()[0] if said else ""
    return count, f" ({reason})" if reason else _build()


def _build() -> str:
    return f" (torch {torch.__version__})"


def _working(device: torch.device, option: str) -> torch.device:
    """The device, if a tensor can be made on it.

    Raises:
        ConfigError: it is there and cannot be used (taken by another process, driver trouble).
    """
    try:
        torch.ones(1, device=device).add_(1)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{option} {device}: the device is there but cannot be used ({reason}); use {option} cpu"
        ) from error
    return device


# --- dtypes -----------------------------------------------------------------------------------------------------------


def resolve_dtype(dtype: str | torch.dtype | None, *, option: str = "--dtype") -> torch.dtype | Literal["auto"]:
    """What a dtype of weights is called (`config.named_dtype`) -> the dtype, or "auto": as they are stored.

    Raises:
        ConfigError: another word, or a dtype that models are not run in.
    """
    name = named_dtype(dtype, option=option)
    return "auto" if name == "auto" else getattr(torch, name)


def dtype_name(dtype: torch.dtype | str) -> str:
    """Name without "torch."."""
    return str(dtype).removeprefix("torch.")
