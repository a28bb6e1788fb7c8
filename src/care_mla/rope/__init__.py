"""Rotary position embeddings as linear algebra: keys of one frequency are a complex vector over the kv heads."""

from care_mla.rope.complex import complex_moment, half_split_heads, real_map
from care_mla.rope.selection import (
    Components,
    RotarySelection,
    components,
    dropped_rotation,
    predicted_rotation_loss,
    select,
)
from care_mla.rope.turning import turned_covariance

__all__ = [
    "Components",
    "RotarySelection",
    "complex_moment",
    "components",
    "dropped_rotation",
    "half_split_heads",
    "predicted_rotation_loss",
    "real_map",
    "select",
    "turned_covariance",
]
