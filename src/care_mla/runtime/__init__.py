"""How models run: devices and precisions, what to do when memory is short, and the walk through their layers."""

from care_mla.runtime.devices import (
    dtype_name,
    has_bfloat16,
    has_float64,
    resolve_device,
    resolve_dtype,
    sums_device,
)
from care_mla.runtime.layers import Batch, LayerWalk, checkpoint_layers, standing_in
from care_mla.runtime.memory import is_out_of_memory, memory_named

__all__ = [
    "Batch",
    "LayerWalk",
    "checkpoint_layers",
    "dtype_name",
    "has_bfloat16",
    "has_float64",
    "is_out_of_memory",
    "memory_named",
    "resolve_device",
    "resolve_dtype",
    "standing_in",
    "sums_device",
]
