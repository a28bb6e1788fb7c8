"""Plain SVD of the weights: every input direction counts alike."""

from jaxtyping import Float
from torch import Tensor

from care_mla.linalg import shrink
from care_mla.methods.registry import Metric, Weighting, method
from care_mla.stats import LayerStatistics


@method("svd", source="Eckart-Young; the paper's 'Palu/SVD' baseline, C = I", baseline=True)
def svd(statistics: LayerStatistics, W: Float[Tensor, "m D"], weighting: Weighting) -> Metric:
    """M = W W^T: outputs of white inputs. Shrinkage has nothing to shrink and changes nothing."""
    gram = W @ W.T
    return Metric(shrink(gram, gram, weighting.shrinkage))
