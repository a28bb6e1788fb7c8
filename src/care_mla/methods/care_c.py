"""CARE-C: C in place of sqrt(C). The one method that needs input moments."""

import torch
from jaxtyping import Float
from torch import Tensor

from care_mla.linalg import shrink
from care_mla.methods.registry import Metric, method, require_inputs
from care_mla.stats import Moments


@method("care_c", source="CARE App. I.8", needs_inputs=True)
def care_c(moments: Moments, W: Float[Tensor, "m D"], shrinkage: float) -> Metric:
    """M = W C^2 W^T with C shrunk as in `care`."""
    C = require_inputs(moments, "care_c")
    C = shrink(C, moments.mean_input_energy * torch.eye(len(C), dtype=C.dtype, device=C.device), shrinkage)
    half = W @ C
    return Metric(half @ half.T)
