"""Methods differ in one thing: the second moment (and output metric) that they decompose.

`METHODS` maps a name to its `Method`; each lives in a file of its own and is one pure function. Those of other papers, to compare
with, are in `methods.baselines`.
"""

from care_mla.methods import baselines, care, fisher  # noqa: F401  (registration)
from care_mla.methods.registry import METHODS, Method, Metric, Weighting, get_method, require_inputs

__all__ = ["METHODS", "Method", "Metric", "Weighting", "get_method", "require_inputs"]
