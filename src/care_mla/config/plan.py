"""Settings of `care plan`: everything `care convert` can be told of the recipe, for several budgets, methods and layouts at once."""

from __future__ import annotations

from typing import Annotated

from care_mla.config.base import RECIPE_PANEL, Option, Settings
from care_mla.config.convert import Recipe

COMPARED = "a comparison of the best recipes and CARE"


class PlanSettings(Settings):
    """What is compared: several values are separated by commas."""

    kv_save: Annotated[str, Option("Shares of the cache to save, separated by commas.", metavar="SHARES")] = (
        "0.5,0.75,0.875"
    )
    layout: Annotated[
        str | None, Option("Latents, separated by commas: joint, split, mla.", metavar="LAYOUTS", default=COMPARED)
    ] = None
    method: Annotated[
        str | None,
        Option("Metrics of the factorization, separated by commas.", RECIPE_PANEL, metavar="METHODS", default=COMPARED),
    ] = None


PLANNED = tuple(
    name
    for name, _, _ in Recipe.options()
    if name
    not in {*PlanSettings.model_fields, "rank", "cache_elements", "refit", "refit_tokens", "refit_ridge", "dtype"}
)
"""Fields of the recipe that change a forecast, beside those that are compared."""
