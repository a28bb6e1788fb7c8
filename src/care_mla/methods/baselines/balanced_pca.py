"""Norm-balanced PCA, TransMLA's factorization: keys and values scaled to equal energy before one joint PCA."""

import torch
from jaxtyping import Float
from torch import Tensor

from care_mla.linalg import PositiveMatrix, shrink
from care_mla.methods.registry import Metric, Weighting, method
from care_mla.stats import LayerStatistics


@method(
    "balanced_pca", source="TransMLA (arXiv 2502.07864), balanced key-value PCA", baseline=True, options=("shrinkage",)
)
def balanced_pca(statistics: LayerStatistics, W: Float[Tensor, "m D"], weighting: Weighting) -> Metric:
    """M = E[y y^T] as in care, G = diag(1 / E||k||^2, 1 / E||v||^2): half of the energy is the keys'.

    Layout mla hands over the position-free keys, whose norm is the one TransMLA balances.
    """
    moments = statistics.moments
    M = shrink(moments.second_moment, moments.mean_input_energy * (W @ W.T), weighting.shrinkage)
    energies = M.diagonal().view(2, -1).sum(1)
    energies = energies.clamp_min(1e-9 * float(energies.max()))  # no position-free keys are left where all of them turn
    balance = torch.diag((1.0 / energies).repeat_interleave(len(M) // 2))
    return Metric(M, PositiveMatrix(balance, name="the balance of keys and values"))
