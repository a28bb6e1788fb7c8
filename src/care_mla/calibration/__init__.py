"""Calibration: windows of tokens in, statistics of every layer out; and the refit, which runs the same text again."""

from care_mla.calibration.collect import Collected, collect_fisher, collect_moments
from care_mla.calibration.propagation import OutputRefit, Propagation
from care_mla.calibration.taps import WITHOUT_FISHER

__all__ = [
    "WITHOUT_FISHER",
    "Collected",
    "OutputRefit",
    "Propagation",
    "collect_fisher",
    "collect_moments",
]
