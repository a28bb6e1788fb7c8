"""Forecasts: ranks and predicted loss of recipes, without writing a model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from care_mla.checkpoint import resolve_source, scratch
from care_mla.config import Recipe
from care_mla.conversion.compare import best_candidate
from care_mla.conversion.decide import Decision, decide
from care_mla.conversion.evidence import SharedEigenpairs, open_statistics
from care_mla.conversion.layer import layer_records, predicted_total
from care_mla.conversion.source import Source
from care_mla.conversion.spectra import Spectra
from care_mla.errors import ConfigError
from care_mla.families import get_family
from care_mla.files import read_json, require_own_file, write_bytes
from care_mla.layouts import get_layout, require_expressible
from care_mla.methods import get_method
from care_mla.pipeline.source import open_source
from care_mla.progress import Track, shown
from care_mla.ranks import RankForecast, RankPlan, allocate, make_budget
from care_mla.stats import StatisticsStore

PLOT_SUFFIXES = (".svg", ".png", ".pdf")


COMPARED_RECIPES: tuple[dict[str, str], ...] = (
    {"method": "fisher", "layout": "joint"},
    {"method": "fisher", "layout": "split"},
    {"method": "care", "layout": "joint", "ranks": "energy"},
    {"method": "care", "layout": "joint", "ranks": "uniform"},
    {"method": "care", "layout": "split", "ranks": "uniform"},
)
"""What `plan_ranks` compares where no recipe is named; the last is the paper's CARE-U."""


def plan_uniform(
    source: str | Path, *, kv_save: Sequence[float] = (0.5, 0.75, 0.875), layouts: Sequence[str] = ("joint", "split")
) -> list[RankPlan]:
    """Equal ranks at every budget, from config.json alone: what can be planned before anything is calibrated.

    Returns:
        Layout by layout, budgets in the order given.

    Raises:
        CheckpointError, UnsupportedModelError, RankError
    """
    from care_mla.modeling import require_buildable

    config = read_json(resolve_source(source, config_only=True) / "config.json")
    family = get_family(config)
    geometry = family.geometry(config)
    require_buildable(config)
    plans = []
    for layout in map(get_layout, layouts):
        require_expressible(family.features(config), layout, family.model_type)
        for share in kv_save:
            budget = make_budget(geometry, layout, kv_save=share)
            unknown = [[torch.zeros(0)] * geometry.num_layers] * budget.num_blocks  # equal ranks ask for no energies
            plans.append(allocate("uniform", unknown, budget))
    return plans


def plan_ranks(
    source: str | Path,
    statistics: str | Path,
    *,
    kv_save: Sequence[float] = (0.5, 0.75, 0.875),
    recipes: Sequence[dict[str, Any]] | None = None,
    track: Track = shown,
    **common: Any,
) -> list[RankForecast]:
    """Ranks and predicted loss increase of every recipe at every budget, without writing a model.

    Args:
        statistics: STATS directory of `calibrate`.
        kv_save: shares of the cache to save.
        recipes: fields of `Recipe` without a budget; None compares `COMPARED_RECIPES`, those that the statistics allow.
        common: further fields of `Recipe`, for all recipes.

    Returns:
        Recipe by recipe, budgets in the order given.

    Raises:
        ConversionError
    """
    opened = open_source(source)
    store = open_statistics(opened, statistics)
    if recipes is None:
        recipes = [r for r in COMPARED_RECIPES if store.has_fisher or not get_method(r["method"]).needs_fisher]
    candidates = [
        decide(opened.facts, opened.family.model_type, Recipe.make(**{**recipe, **common}, kv_save=share))
        for recipe in recipes
        for share in kv_save
    ]
    forecasts = []
    with scratch() as work:
        shared = SharedEigenpairs(work)
        decided = [best_candidate(opened, store, each, shared, track)[0] for each in candidates]
        for _, group in groupby(decided, key=lambda decision: decision.spectra_key):
            forecasts += _forecasts(list(group), opened, store, shared, track)
    return forecasts


def _forecasts(
    decisions: Sequence[Decision], source: Source, statistics: StatisticsStore, shared: SharedEigenpairs, track: Track
) -> list[RankForecast]:
    """Forecasts of decisions that share their spectra."""
    forecasts = []
    with scratch() as work:
        spectra = Spectra(source, statistics, decisions[0], work, shared=shared, track=track)
        for decision in decisions:
            plan = spectra.of(decision).allocate()
            records = layer_records(spectra.of(decision), plan)
            forecasts.append(
                RankForecast(
                    decision.acted,
                    plan.kv_save(source.geometry),
                    plan,
                    predicted_total(records),
                    tuple(spectra.notes),
                )
            )
    return forecasts


def plot_forecasts(source: str | Path, forecasts: Sequence[RankForecast], path: str | Path) -> None:
    """Draw what `plan_ranks` returned; the suffix of `path` chooses the format.

    Raises:
        ConfigError: a format that cannot be drawn, or a folder that is not there.
    """
    from care_mla.report import figures

    geometry = open_source(source).geometry
    path = require_plot(path)
    write_bytes(path, figures.drawn(figures.forecast(forecasts, 2 * geometry.kv_width), path.suffix[1:]))


def require_plot(path: str | Path) -> Path:
    """A path that a plot can be written to.

    Raises:
        ConfigError, CheckpointError: a format that cannot be drawn; a folder that is not there, a file that care did not write.
    """
    path = Path(path).expanduser()
    if path.suffix not in PLOT_SUFFIXES:
        raise ConfigError(f"--plot {path}: choose a name that ends in {', '.join(PLOT_SUFFIXES)}")
    require_own_file(path, "--plot")
    return path
