"""Calibration: text in, moments out."""

from care_mla.calibration.collect import (
    NormalizedKeysTap,
    NormalizedTap,
    checkpoint_layers,
    collect_fisher,
    collect_moments,
    normalized_keys_taps,
    normalized_taps,
)
from care_mla.calibration.corpus import Batch, TokenWindows, load_text, load_tokenizer, make_windows
from care_mla.calibration.propagation import OutputRefit, Propagation

__all__ = [
    "Batch",
    "NormalizedKeysTap",
    "NormalizedTap",
    "OutputRefit",
    "Propagation",
    "TokenWindows",
    "checkpoint_layers",
    "collect_fisher",
    "collect_moments",
    "load_text",
    "load_tokenizer",
    "make_windows",
    "normalized_keys_taps",
    "normalized_taps",
]
