"""Methods of other papers, to compare with: none of them is what a conversion should be made with."""

from care_mla.methods.baselines import asvd, balanced_pca, care_c, svd, svd_llm  # noqa: F401  (registration)
