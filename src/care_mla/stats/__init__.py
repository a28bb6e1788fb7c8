"""Streaming statistics of one layer's projections, and the directory they are kept in."""

from care_mla.stats.moments import Moments
from care_mla.stats.store import StatisticsStore, StatisticsWriter

__all__ = ["Moments", "StatisticsStore", "StatisticsWriter"]
