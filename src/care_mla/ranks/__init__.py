"""How many latent dimensions each layer gets: budgets, bounds, allocators."""

from care_mla.ranks.allocators import ALLOCATORS, allocate, check_allocation
from care_mla.ranks.forecast import RankForecast
from care_mla.ranks.plan import Budget, RankPlan, make_budget

__all__ = ["ALLOCATORS", "Budget", "RankForecast", "RankPlan", "allocate", "check_allocation", "make_budget"]
