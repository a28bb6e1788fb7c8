"""Streaming statistics of one layer's projections, and the directory they are kept in."""

from care_mla.stats.cross import CrossMoments
from care_mla.stats.fisher import FisherMoments
from care_mla.stats.moments import Moments
from care_mla.stats.normalized import NormalizedStatistics
from care_mla.stats.store import LayerStatistics, StatisticsStore, StatisticsWriter

__all__ = [
    "CrossMoments",
    "FisherMoments",
    "LayerStatistics",
    "Moments",
    "NormalizedStatistics",
    "StatisticsStore",
    "StatisticsWriter",
]
