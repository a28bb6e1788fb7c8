"""From a recipe to a rank plan: what is decided before a weight is written, and forecasts of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from care_mla.checkpoint import resolve_source, scratch
from care_mla.config import Recipe
from care_mla.config.policy import policy
from care_mla.errors import ConfigError, RankError
from care_mla.families import get_family
from care_mla.files import read_json, require_own_file, write_bytes
from care_mla.geometry import Geometry
from care_mla.methods import get_method
from care_mla.names import Layout
from care_mla.pipeline.evidence import SharedEigenpairs
from care_mla.pipeline.source import Source, open_source, require_expressible
from care_mla.pipeline.spectra import LayerSpectra, layer_records, predicted_total, weighting_of
from care_mla.pipeline.statistics import open_statistics
from care_mla.progress import Track, shown
from care_mla.ranks import Budget, RankPlan, allocate, check_allocation, make_budget
from care_mla.stats import StatisticsStore

PLOT_SUFFIXES = (".svg", ".png", ".pdf")


ROTARY_WIDTHS = (16, 32, 48, 64, 96, 128)
"""Widths of the rotary key that layout mla chooses from, where none is given."""


LATENT_LOSS_WEIGHT = 4.0
"""How much more a predicted loss of the latent counts than one of dropped rotations when widths are compared: on held-out text
the first came out too low, the second too high (docs/mla.md); 3 to 6 choose the same widths."""


def require_recipe(source: Source, recipe: Recipe) -> list[tuple[Recipe, Budget]]:
    """Everything about a recipe that can be refused before weights are read; the recipe with its defaults decided.

    Layout mla without a rotary width: one recipe for every width that may be chosen, see `settle`.
    """
    method = get_method(recipe.method)
    if recipe.ranks == "fisher" and not method.needs_fisher:
        raise ConfigError(
            f"--ranks fisher spends the budget by predicted loss, which --method {recipe.method} does not know; use --ranks energy"
        )
    require_expressible(source.family, source.reader.config, recipe.layout)
    if recipe.layout == "mla" and recipe.refit:
        raise ConfigError("--refit is not available with --layout mla")
    features = source.family.features(source.reader.config)
    if recipe.qk_norm == "linear" and (recipe.layout != "mla" or "QK-norm" not in features):
        raise ConfigError("--qk-norm linear needs --layout mla and a model with QK-norm")
    if recipe.q_lora_rank is not None:
        _require_query_rank(recipe, source.geometry)
    if (
        recipe.freq_fold is not None
        and recipe.freq_fold > 1
        and not (
            recipe.layout == "mla" and recipe.rope != "free" and source.geometry.head_dim // 2 % recipe.freq_fold == 0
        )
    ):
        raise ConfigError(
            f"--freq-fold {recipe.freq_fold} needs --layout mla --rope stock or transmla, and must divide the "
            f"{source.geometry.head_dim // 2} frequencies of a head"
        )
    options, refused = [], None
    for width in _rotary_widths(recipe, source.geometry):
        try:
            options.append(_at_width(source, recipe, width))
        except RankError as error:
            refused = refused or error
    if not options:
        assert refused is not None
        raise refused
    return options


def _require_query_rank(recipe: Recipe, geometry: Geometry) -> None:
    queries = geometry.num_heads * geometry.head_dim
    if recipe.layout != "mla":
        raise ConfigError(f"--q-lora-rank {recipe.q_lora_rank} needs --layout mla")
    assert recipe.q_lora_rank is not None
    if recipe.q_lora_rank > min(geometry.hidden_size, queries):
        raise RankError(
            f"--q-lora-rank {recipe.q_lora_rank} is outside 1..{min(geometry.hidden_size, queries)} (hidden size {geometry.hidden_size}, "
            f"{queries} outputs of all query heads)"
        )


def _at_width(source: Source, recipe: Recipe, qk_rope_head_dim: int) -> tuple[Recipe, Budget]:
    """A recipe with a rotary key of this width, its budget, and the defaults that follow from it."""
    cached_scales = recipe.layout == "mla" and source.family.k_norm is not None and recipe.qk_norm == "exact"
    budget = make_budget(
        source.geometry,
        recipe.layout,
        rank=recipe.rank,
        kv_save=recipe.kv_save,
        cache_elements=recipe.cache_elements,
        qk_rope_head_dim=qk_rope_head_dim,
        key_scales=source.geometry.num_kv_heads if cached_scales else 0,
    )
    best = policy(
        budget.kv_save, predicts_loss=get_method(recipe.method).needs_fisher, can_refit=recipe.layout != "mla"
    )
    decided = recipe.model_copy(
        update={name: value for name, value in asdict(best).items() if getattr(recipe, name) is None}
    )
    if recipe.layout == "mla":
        fold = recipe.freq_fold or _freq_fold(recipe, qk_rope_head_dim, source.geometry)
        decided = decided.model_copy(update={"qk_rope_head_dim": qk_rope_head_dim, "freq_fold": fold})
    assert decided.ranks is not None
    check_allocation(
        decided.ranks, budget, min_rank=recipe.min_rank, max_rank=recipe.max_rank, multiple=recipe.rank_multiple
    )
    return decided, budget


def _freq_fold(recipe: Recipe, qk_rope_head_dim: int, geometry: Geometry) -> int:
    """Default of `Recipe.freq_fold`: a frequency that no rotary pair has would stand still, so it folds with one that has."""
    frequencies = geometry.head_dim // 2
    step = frequencies // (qk_rope_head_dim // 2)
    if recipe.rope != "stock" or frequencies * geometry.num_kv_heads <= qk_rope_head_dim // 2:
        return 1
    fold = max(2, step)
    return fold if frequencies % fold == 0 else 1


def _rotary_widths(recipe: Recipe, geometry: Geometry) -> list[int]:
    """Widths that the shared rotary key may get; 0 where the layout has none."""
    if recipe.layout != "mla":
        return [0]
    if recipe.qk_rope_head_dim is not None:
        return [recipe.qk_rope_head_dim]
    if not get_method(recipe.method).needs_fisher:  # nothing predicts the loss
        return [geometry.head_dim]
    possible = [width for width in ROTARY_WIDTHS if width <= geometry.kv_width]
    if recipe.rope != "free":
        possible = [width for width in possible if geometry.head_dim % width == 0]
    return possible or [geometry.head_dim]


def settle(
    source: Source,
    statistics: StatisticsStore,
    options: Sequence[tuple[Recipe, Budget]],
    track: Track,
    shared: SharedEigenpairs | None,
) -> tuple[Recipe, Budget, dict[int, dict[str, float]]]:
    """The rotary width of least predicted loss, the latent's part weighted (`LATENT_LOSS_WEIGHT`), and by width what dropped
    rotations and truncation were predicted to lose; nothing to do for one option."""
    if len(options) == 1:
        return *options[0], {}
    parts: dict[int, dict[str, float]] = {}
    for recipe, budget in options:
        with scratch() as work:
            spectra = LayerSpectra(source, statistics, recipe, work, shared=shared, track=track)
            records = layer_records(spectra, rank_plan(spectra, budget, recipe))
        rotation = sum(record["predicted_rotation_loss"] for record in records)
        total = predicted_total(records)
        assert total is not None
        parts[budget.qk_rope_head_dim] = {"rotation": rotation, "latent": total - rotation}

    def price(option: tuple[Recipe, Budget]) -> float:
        lost = parts[option[1].qk_rope_head_dim]
        return lost["rotation"] + LATENT_LOSS_WEIGHT * lost["latent"]

    return *min(options, key=price), parts


def rank_plan(spectra: LayerSpectra, budget: Budget, recipe: Recipe) -> RankPlan:
    assert recipe.ranks is not None
    return allocate(
        recipe.ranks,
        spectra.energies,
        budget,
        min_rank=recipe.min_rank,
        max_rank=recipe.max_rank,
        multiple=recipe.rank_multiple,
    )


@dataclass(frozen=True)
class RankForecast:
    """What one recipe would do at one budget, known without writing a model.

    Attributes:
        recipe: as it would stand in the manifest.
        kv_save: share of the cache that the plan saves.
        predicted_loss_increase: nats per token, before any refit; None without Fisher statistics.
        notes: what the user should know of the statistics.
    """

    recipe: dict[str, Any]
    kv_save: float
    plan: RankPlan
    predicted_loss_increase: float | None
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Method, layout and allocator."""
        return f"{self.recipe['method']}, {self.recipe['layout']}, {self.recipe['ranks']} ranks"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "recipe": self.recipe,
            "kv_save": self.kv_save,
            "cache_elements_per_token": self.plan.cache_elements_per_token,
            "predicted_loss_increase": self.predicted_loss_increase,
            "plan": self.plan.to_dict(),
            "notes": list(self.notes),
        }


COMPARED_RECIPES: tuple[dict[str, str], ...] = (
    {"method": "fisher", "layout": "joint"},
    {"method": "fisher", "layout": "split"},
    {"method": "care", "layout": "joint", "ranks": "energy"},
    {"method": "care", "layout": "joint", "ranks": "uniform"},
    {"method": "care", "layout": "split", "ranks": "uniform"},
)
"""What `plan_ranks` compares where no recipe is named; the last is the paper's CARE-U."""


def plan_uniform(
    source: str | Path, *, kv_save: Sequence[float] = (0.5, 0.75, 0.875), layouts: Sequence[Layout] = ("joint", "split")
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
    for layout in layouts:
        require_expressible(family, config, layout)
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
    options = [
        require_recipe(opened, Recipe.make(**{**recipe, **common}, kv_save=share))
        for recipe in recipes
        for share in kv_save
    ]
    forecasts = []
    with scratch() as common_work:
        shared = SharedEigenpairs(common_work)
        decided = [settle(opened, store, each, track, shared)[:2] for each in options]
        for _, group in groupby(decided, key=lambda one: _spectra_key(one[0])):
            budgets = list(group)
            with scratch() as work:
                spectra = LayerSpectra(opened, store, budgets[0][0], work, shared=shared, track=track)
                for recipe, budget in budgets:
                    plan = rank_plan(spectra, budget, recipe)
                    records = layer_records(spectra, plan)
                    forecasts.append(
                        RankForecast(
                            recipe.model_dump(),
                            plan.kv_save(opened.geometry),
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


def _spectra_key(recipe: Recipe) -> tuple[Any, ...]:
    """What the spectra of a recipe depend on."""
    rotary: tuple[Any, ...] = ()
    if recipe.layout == "mla":
        rotary = recipe.rope, recipe.freq_fold, recipe.qk_rope_head_dim, recipe.context, recipe.qk_norm
    return recipe.method, recipe.layout, weighting_of(recipe), rotary
