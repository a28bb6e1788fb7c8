"""One process or several, that `torchrun` or `accelerate launch` started: who writes, where each runs, what is exchanged."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from care_mla.errors import ConfigError, ConversionError
from care_mla.healing.distillation import Distillation
from care_mla.runtime import has_bfloat16, resolve_device

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")


# --- who acts ---------------------------------------------------------------------------------------------------------


def is_main() -> bool:
    """Whether this process writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def wait() -> None:
    """Until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def on_main(action: Callable[[], T]) -> T | None:
    """Let the main process act while the others wait; what it refuses is refused by all of them.

    Returns:
        What the action gives; None on the other processes.

    Raises:
        ConversionError: of the action.
    """
    refused: list[ConversionError | None] = [None]
    result = None
    if is_main():
        try:
            result = action()
        except ConversionError as error:
            refused[0] = error
    if dist.is_initialized():
        dist.broadcast_object_list(refused, src=0)
    if refused[0] is not None:
        raise refused[0]
    return result


# --- where ------------------------------------------------------------------------------------------------------------


def require_accelerate() -> None:
    """
    Raises:
        ConfigError: not installed.
    """
    if find_spec("accelerate") is None:
        raise ConfigError("healing needs accelerate: pip install 'care-mla[heal]'")


def make_accelerator(device: str | int | torch.device | None, log_with: str | None, logs: Path) -> Accelerator:
    """accelerate on the device that --device names, or on one each of several processes.

    Args:
        log_with: a tracker, see `pipeline.heal`.
        logs: directory of what trackers write.

    Raises:
        ConfigError: accelerate or the tracker is not installed, or a device that is not there, or of one process alone.
    """
    require_accelerate()
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    where = resolve_device(device)
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if not alone and where.index is not None:
        raise ConfigError(f"--device {device}: each process has a device of its own; name --device {where.type}")
    if alone and PartialState._shared_state.get("device", where) != where:
        # accelerate keeps the device of its first run for as long as the process lives
        AcceleratorState._reset_state(reset_partial_state=True)
    try:
        with _accelerate_on(where if alone else None):
            accelerator = Accelerator(cpu=where.type == "cpu", log_with=log_with, project_dir=logs)
    except ValueError as error:
        raise ConfigError(f"--log-with {log_with}: {error}") from error
    if log_with is not None and not accelerator.log_with:
        raise ConfigError(f"--log-with {log_with} is not installed: pip install {log_with}")
    return accelerator


def require_even_shares(batch_size: int, accelerator: Accelerator) -> None:
    """
    Raises:
        ConfigError: the blocks of a step cannot be shared out evenly over the processes.
    """
    if batch_size % accelerator.num_processes:
        raise ConfigError(f"--batch-size {batch_size} is not a multiple of the {accelerator.num_processes} processes")


@contextmanager
def _accelerate_on(device: torch.device | None) -> Iterator[None]:
    """What accelerate reads to know its device; None: it finds out by itself, as each of several processes must."""
    name, before = "ACCELERATE_TORCH_DEVICE", os.environ.get("ACCELERATE_TORCH_DEVICE")
    if device is not None:
        os.environ[name] = str(device)
    try:
        yield
    finally:
        if device is not None:
            os.environ.pop(name)
            os.environ.update({} if before is None else {name: before})


# --- what runs there --------------------------------------------------------------------------------------------------


def distribute(distillation: Distillation, accelerator: Accelerator, *, shard: bool) -> nn.Module:
    """The module for this number of processes: as it is for one, else replicated (DDP) or sharded layer by layer (FSDP2).

    accelerate offers FSDP2 on accelerators only; torch's `fully_shard`, which it calls there, works on CPUs as well.
    """
    distillation.to(accelerator.device)
    if accelerator.num_processes == 1:
        return distillation
    if not shard:
        module: nn.Module = accelerator.prepare_model(distillation)
        return module
    for layer in distillation.pupil.decoder_layers():
        fully_shard(layer)
    if distillation.teacher is not None:
        fully_shard(distillation.teacher)
    fully_shard(distillation)
    register_fsdp_forward_method(distillation, "teacher_top")
    return distillation


def is_bfloat16(device: torch.device, precision: str) -> bool:
    """Whether products are made in bfloat16: where asked for, or (auto) where the device has them in hardware."""
    return has_bfloat16(device) if precision == "auto" else precision == "bfloat16"


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """The precision of products, see `is_bfloat16`."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_bfloat16(device, precision))
