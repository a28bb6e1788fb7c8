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
from care_mla.calibration.corpus import Batch, TokenWindows, make_windows
from care_mla.calibration.documents import joined, load_text, stream_documents
from care_mla.calibration.propagation import OutputRefit, Propagation
from care_mla.calibration.tokens import embedding_rows, load_tokenizer

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
    "embedding_rows",
    "joined",
    "load_text",
    "load_tokenizer",
    "make_windows",
    "normalized_keys_taps",
    "normalized_taps",
    "stream_documents",
]
