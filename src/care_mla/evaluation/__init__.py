"""What a conversion lost: perplexity, KL to the reference, agreement, and the live cache's size."""

from care_mla.evaluation.cache import CacheUsage, measure_cache
from care_mla.evaluation.metrics import Evaluation, evaluate_model, evaluation_windows, require_windows

__all__ = ["CacheUsage", "Evaluation", "evaluate_model", "evaluation_windows", "measure_cache", "require_windows"]
