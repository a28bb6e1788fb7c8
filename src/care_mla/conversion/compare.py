"""Where a recipe left something open that only the predicted loss can choose: the spectra of every candidate, and the best."""

from __future__ import annotations

from collections.abc import Sequence

from care_mla.checkpoint import scratch
from care_mla.conversion.decide import Decision
from care_mla.conversion.evidence import SharedEigenpairs
from care_mla.conversion.layer import predicted_by_cause
from care_mla.conversion.source import Source
from care_mla.conversion.spectra import Spectra
from care_mla.progress import Track
from care_mla.stats import StatisticsStore


def best_candidate(
    source: Source,
    statistics: StatisticsStore,
    candidates: Sequence[Decision],
    shared: SharedEigenpairs | None,
    track: Track,
) -> tuple[Decision, dict[str, dict[str, float]]]:
    """The candidate of least price, see `Layout.price`.

    Args:
        candidates: from `decide`.

    Returns:
        The best, and what every candidate was predicted to lose, by its name and by cause; empty where there is only one.
    """
    if len(candidates) == 1:
        return candidates[0], {}
    predicted = {}
    for candidate in candidates:
        with scratch() as work:
            spectra = Spectra(source, statistics, candidate, work, shared=shared, track=track)
            predicted[_name(candidate)] = predicted_by_cause(spectra, spectra.allocate())
    return min(candidates, key=lambda one: one.layout.price(predicted[_name(one)])), predicted


def _name(candidate: Decision) -> str:
    return candidate.layout.candidate_name(candidate.options)
