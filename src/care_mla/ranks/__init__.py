"""How many latent dimensions each layer gets: budgets, bounds, allocators."""

from care_mla.ranks.allocators import ALLOCATORS, allocate, check_allocation
from care_mla.ranks.plan import Budget, RankPlan, make_budget

__all__ = ["ALLOCATORS", "Budget", "RankPlan", "allocate", "check_allocation", "make_budget"]
