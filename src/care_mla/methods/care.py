"""CARE: keep the output directions of largest second moment. SVD-LLM's whitening finds the same subspace."""

from jaxtyping import Float
from torch import Tensor

from care_mla.linalg import shrink
from care_mla.methods.registry import Metric, Weighting, method
from care_mla.stats import LayerStatistics


@method("care", source="CARE Eq. 2-4", options=("shrinkage",))
def care(statistics: LayerStatistics, W: Float[Tensor, "m D"], weighting: Weighting) -> Metric:
    """M = (1-a) E[y y^T] + a lambda W W^T, which is W ((1-a) C + a lambda I) W^T, lambda = E||x||^2 / D.

    With any L such that L L^T = C (the square root for CARE, Cholesky for SVD-LLM) the truncated SVD of W L, times
    L^-1, projects W on the leading eigenvectors of W C W^T = M: the two methods differ in rounding only.
    """
    return Metric(
        shrink(statistics.moments.second_moment, statistics.moments.mean_input_energy * (W @ W.T), weighting.shrinkage)
    )
