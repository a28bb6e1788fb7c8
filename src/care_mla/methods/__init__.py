"""Methods differ in one thing: the second moment (and output metric) that they decompose.

`METHODS` maps a name to its `Method`; each lives in a file of its own and is one pure function.
"""

from care_mla.methods import asvd, balanced_pca, care, care_c, fisher, svd  # noqa: F401  (registration)
from care_mla.methods.registry import METHODS, Coupling, Method, Metric, Weighting, get_method, require_inputs

__all__ = ["METHODS", "Coupling", "Method", "Metric", "Weighting", "get_method", "require_inputs"]
