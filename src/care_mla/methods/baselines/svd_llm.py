"""SVD-LLM: truncation-aware whitening. It keeps the subspace that CARE keeps, and so shares its function."""

from care_mla.methods.care import care
from care_mla.methods.registry import method

svd_llm = method(
    "svd_llm", source="SVD-LLM (arXiv 2403.07378), Cholesky whitening", baseline=True, options=("shrinkage",)
)(care)
