"""What a recipe would do at a budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from care_mla.ranks.plan import RankPlan


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
