"""Where and in which precision models run: what --device and --dtype mean, and what to do when memory is short."""

from care_mla.runtime.devices import (
    dtype_name,
    has_bfloat16,
    has_float64,
    resolve_device,
    resolve_dtype,
    sums_device,
)
from care_mla.runtime.memory import is_out_of_memory, memory_named

__all__ = [
    "dtype_name",
    "has_bfloat16",
    "has_float64",
    "is_out_of_memory",
    "memory_named",
    "resolve_device",
    "resolve_dtype",
    "sums_device",
]
