"""From a recipe to decisions: everything that can be refused, and all that the budget decides, before a weight is read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from care_mla.config import Recipe
from care_mla.config.policy import policy
from care_mla.errors import ConfigError, RankError
from care_mla.layouts import LAYOUTS, Layout, SourceFacts, get_layout, layouts_with, require_expressible
from care_mla.methods import METHODS, Method, Weighting, get_method
from care_mla.ranks import Budget, check_allocation, make_budget

REFIT_OPTIONS = frozenset({"refit", "refit_tokens", "refit_ridge"})
"""Options that act once the ranks are known: spectra do not depend on them."""

OF_LAYOUTS = frozenset().union(*(layout.options for layout in LAYOUTS.values()))
"""Fields of a recipe that some layouts read."""
OF_METHODS = frozenset().union(*(method.options for method in METHODS.values()))
"""Fields of a recipe that some methods read."""


@dataclass(frozen=True)
class Decision:
    """A recipe in which nothing is open, and the budget that it spends.

    Attributes:
        recipe: as given, what was left open decided.
        facts: of the source that it was decided for.
    """

    recipe: Recipe
    layout: Layout
    method: Method
    budget: Budget
    facts: SourceFacts

    @property
    def options(self) -> dict[str, Any]:
        """The fields of the recipe that its layout reads."""
        return options_of(self.recipe, self.layout)

    @property
    def weighting(self) -> Weighting:
        """The fields of the recipe that methods read."""
        recipe = self.recipe
        assert recipe.fisher_exponent is not None
        return Weighting(
            shrinkage=recipe.shrinkage,
            fisher_exponent=recipe.fisher_exponent,
            fisher_shrinkage=recipe.fisher_shrinkage,
            centre=recipe.centre,
        )

    @property
    def acted(self) -> dict[str, Any]:
        """The fields of the recipe that changed something, for records: a conversion with these alone is the same one."""
        acting = self.method.options | self.layout.acting(self.facts, self.options)
        values = self.recipe.model_dump()
        return {
            name: value
            for name, value in values.items()
            if value is not None and (name in acting or name not in OF_LAYOUTS | OF_METHODS)
        }

    @property
    def spectra_key(self) -> tuple[Any, ...]:
        """What the spectra depend on."""
        weighting = {name: value for name, value in asdict(self.weighting).items() if name in self.method.options}
        options = {name: value for name, value in self.options.items() if name not in REFIT_OPTIONS}
        return self.method.name, self.layout.name, tuple(weighting.items()), tuple(sorted(options.items()))


def options_of(recipe: Recipe, layout: Layout) -> dict[str, Any]:
    """The fields of a recipe that a layout reads."""
    return {name: getattr(recipe, name) for name in layout.options}


def statistics_needed(recipe: Recipe) -> dict[str, bool]:
    """Fields of `CalibrationSettings` that a recipe needs."""
    method = get_method(recipe.method)
    return {
        "inputs": method.needs_inputs or recipe.q_lora_rank is not None,
        "fisher": method.needs_fisher,
        "normalized": recipe.qk_norm == "linear",
    }


def decide(facts: SourceFacts, model_type: str, recipe: Recipe) -> list[Decision]:
    """What a recipe comes to for a source; several decisions where the predicted loss is to choose, see `conversion.compare`.

    Raises:
        ConfigError: options that do not apply or fit each other.
        UnsupportedModelError: a feature of the source that the layout would drop.
        RankError: a budget or bounds that cannot be met.
    """
    method, layout = get_method(recipe.method), get_layout(recipe.layout)
    if recipe.ranks == "fisher" and not method.needs_fisher:
        raise ConfigError(
            f"--ranks fisher spends the budget by predicted loss, which --method {recipe.method} does not know; use --ranks energy"
        )
    require_expressible(facts.features, layout, model_type)
    _require_applicable(recipe, method, layout, facts)
    layout.require_options(facts, options_of(recipe, layout))
    decisions, refused = [], None
    for values in layout.candidates(facts, options_of(recipe, layout), predicts_loss=method.needs_fisher):
        try:
            decisions.append(_decided(recipe.model_copy(update=values), method, layout, facts))
        except RankError as error:
            refused = refused or error
    if not decisions:
        assert refused is not None
        raise refused
    return decisions


def _require_applicable(recipe: Recipe, method: Method, layout: Layout, facts: SourceFacts) -> None:
    """Refuse options that were set and would change nothing. A switch that was set to off changes nothing, as was wished.

    Raises:
        ConfigError
    """
    given = [name for name in type(recipe).model_fields if name in recipe.model_fields_set]
    given = [name for name in given if getattr(recipe, name) not in (None, False)]
    also_read = layout.acting(facts, options_of(recipe, layout))
    for name in given:
        option = f"--{name.replace('_', '-')}"
        if name in OF_LAYOUTS and name not in layout.options:
            raise ConfigError(
                f"{option} does not apply to --layout {layout.name}; leave it out, or use --layout {layouts_with(name)}"
            )
        if name in OF_METHODS and name not in method.options | also_read:
            able = " or ".join(other.name for other in METHODS.values() if name in other.options and not other.baseline)
            raise ConfigError(
                f"{option} does not apply to --method {method.name}; leave it out, or use --method {able}"
            )


def _decided(recipe: Recipe, method: Method, layout: Layout, facts: SourceFacts) -> Decision:
    """A candidate with its budget, and the defaults that follow from it.

    Raises:
        RankError
    """
    budget = make_budget(
        facts.geometry,
        layout,
        rank=recipe.rank,
        kv_save=recipe.kv_save,
        cache_elements=recipe.cache_elements,
        beside=layout.cached_beside(facts, options_of(recipe, layout)),
    )
    best = policy(budget.kv_save, predicts_loss=method.needs_fisher, can_refit="refit" in layout.options)
    open_fields = {name: value for name, value in asdict(best).items() if getattr(recipe, name) is None}
    recipe = recipe.model_copy(update=open_fields)
    assert recipe.ranks is not None
    check_allocation(
        recipe.ranks, budget, min_rank=recipe.min_rank, max_rank=recipe.max_rank, multiple=recipe.rank_multiple
    )
    return Decision(recipe, layout, method, budget, facts)
