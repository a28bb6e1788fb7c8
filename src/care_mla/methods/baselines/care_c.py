"""CARE-C: C in place of sqrt(C). The one method that needs input statistics.moments."""

import torch
from jaxtyping import Float
from torch import Tensor

from care_mla.linalg import shrink
from care_mla.methods.registry import Metric, Weighting, method, require_inputs
from care_mla.stats import LayerStatistics


@method("care_c", source="CARE App. I.8", baseline=True, needs_inputs=True, options=("shrinkage",))
def care_c(statistics: LayerStatistics, W: Float[Tensor, "m D"], weighting: Weighting) -> Metric:
    """M = W C^2 W^T with C shrunk as in `care`."""
    C = require_inputs(statistics, "method care_c")
    C = shrink(
        C, statistics.moments.mean_input_energy * torch.eye(len(C), dtype=C.dtype, device=C.device), weighting.shrinkage
    )
    half = W @ C
    return Metric(half @ half.T)
