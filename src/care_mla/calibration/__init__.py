"""Calibration: text in, moments out."""

from care_mla.calibration.collect import collect_fisher, collect_moments
from care_mla.calibration.corpus import Batch, TokenWindows, load_text, load_tokenizer, make_windows

__all__ = ["Batch", "TokenWindows", "collect_fisher", "collect_moments", "load_text", "load_tokenizer", "make_windows"]
