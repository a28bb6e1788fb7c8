"""How many latent dimensions each layer gets: budgets, bounds, allocators. Names are imported when they are first used."""

from typing import TYPE_CHECKING

from care_mla.lazy import on_first_use

if TYPE_CHECKING:
    from care_mla.ranks.allocators import ALLOCATORS, allocate, check_allocation
    from care_mla.ranks.forecast import RankForecast
    from care_mla.ranks.plan import Budget, RankPlan, make_budget

on_first_use(
    __name__,
    {
        "care_mla.ranks.allocators": (
            "ALLOCATORS",
            "allocate",
            "check_allocation",
        ),
        "care_mla.ranks.forecast": ("RankForecast",),
        "care_mla.ranks.plan": (
            "Budget",
            "RankPlan",
            "make_budget",
        ),
    },
)
