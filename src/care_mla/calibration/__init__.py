"""Calibration: text in, moments out."""

from care_mla.calibration.collect import checkpoint_layers, collect_fisher, collect_moments, collect_normalized
from care_mla.calibration.corpus import Batch, TokenWindows, load_text, load_tokenizer, make_windows
from care_mla.calibration.propagation import OutputRefit, Propagation

__all__ = [
    "Batch",
    "OutputRefit",
    "Propagation",
    "TokenWindows",
    "checkpoint_layers",
    "collect_fisher",
    "collect_moments",
    "collect_normalized",
    "load_text",
    "load_tokenizer",
    "make_windows",
]
