"""Calibration: windows of tokens in, moments out."""

from care_mla.calibration.collect import (
    WITHOUT_FISHER,
    NormalizedKeysTap,
    NormalizedTap,
    checkpoint_layers,
    collect_fisher,
    collect_moments,
    normalized_keys_taps,
    normalized_taps,
)
from care_mla.calibration.propagation import OutputRefit, Propagation

__all__ = [
    "WITHOUT_FISHER",
    "NormalizedKeysTap",
    "NormalizedTap",
    "OutputRefit",
    "Propagation",
    "checkpoint_layers",
    "collect_fisher",
    "collect_moments",
    "normalized_keys_taps",
    "normalized_taps",
]
