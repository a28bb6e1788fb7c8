"""Activation-aware SVD: inputs scaled by their mean magnitude."""

from jaxtyping import Float
from torch import Tensor

from care_mla.linalg import shrink
from care_mla.methods.registry import Metric, Weighting, method
from care_mla.stats import LayerStatistics

EXPONENT = 0.5
"""alpha of the ASVD paper's scaling S = diag(mean |x|^alpha)."""


@method(
    "asvd", source="ASVD (arXiv 2312.05821), Sec. 3.2: SVD of W S, then S^-1", baseline=True, options=("shrinkage",)
)
def asvd(statistics: LayerStatistics, W: Float[Tensor, "m D"], weighting: Weighting) -> Metric:
    """M = W S^2 W^T: (W S)_r S^-1 is the projection of W on the leading left singular vectors of W S."""
    squared_scale = (statistics.moments.input_magnitude / statistics.moments.weight) ** (2 * EXPONENT)
    return Metric(shrink((W * squared_scale) @ W.T, squared_scale.mean() * (W @ W.T), weighting.shrinkage))
