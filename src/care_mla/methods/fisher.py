"""Fisher: keep the directions that the loss would miss, not those in which the outputs are large."""

import torch
from jaxtyping import Float
from torch import Tensor

from care_mla.errors import CalibrationError
from care_mla.linalg import PositiveMatrix, shrink
from care_mla.methods.registry import Metric, Weighting, method
from care_mla.stats import LayerStatistics


@method(
    "fisher",
    source="loss-aware metric, see docs/method.md",
    needs_fisher=True,
    options=("shrinkage", "fisher_exponent", "fisher_shrinkage", "centre"),
)
def fisher(statistics: LayerStatistics, W: Float[Tensor, "m D"], weighting: Weighting) -> Metric:
    """M = second moment of y - mu, G = tempered second moment of the loss gradients at y.

    G is scaled to mean eigenvalue 1 before the power and back after it, so that energies of different layers stay
    comparable; shrinkage and power keep its eigenvectors, so one decomposition of it serves all of them. The mean is taken out before shrinkage: shrinking first would leave M indefinite along mu.

    Raises:
        CalibrationError: no Fisher statistics.
    """
    collected = statistics.fisher
    if collected is None:
        raise CalibrationError(
            "method fisher needs Fisher statistics; calibrate without --no-fisher, or choose --method care"
        )
    mean = collected.mean if weighting.centre else torch.zeros_like(collected.mean)
    centred = collected.second_moment - torch.outer(mean, mean)
    second_moment = shrink(centred, statistics.moments.mean_input_energy * (W @ W.T), weighting.shrinkage)
    values, vectors = statistics.gradients.eigenpairs
    scale = values.mean()
    damped = shrink(values / scale, torch.ones_like(values), weighting.fisher_shrinkage)
    metric = PositiveMatrix(name="the Fisher metric G", eigenpairs=(damped, vectors))
    return Metric(second_moment, metric.tempered(weighting.fisher_exponent, scale), mean if weighting.centre else None)
