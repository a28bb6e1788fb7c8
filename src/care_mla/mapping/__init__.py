"""Factors to checkpoint tensors, one file a target layout."""

from care_mla.mapping import latent, mla
from care_mla.mapping.latent import (
    DenseProjections,
    dense_projections,
    latent_tensors,
    predicted_loss_increase,
    relative_errors,
    share,
    split_blocks,
)
from care_mla.mapping.mla import AttentionWeights, mla_tensors, position_free
from care_mla.mapping.qk_norm import constant_scale, linearization_error, linearized_attention, linearized_statistics
from care_mla.mapping.queries import query_factors, query_metric, relative_query_error
from care_mla.names import Layout

EXPRESSES: dict[Layout, dict[str, str]] = {"split": latent.EXPRESSES, "joint": latent.EXPRESSES, "mla": mla.EXPRESSES}
"""By layout: features of a source (`FamilySpec.features`) that it keeps, and how. One that is not there cannot be converted."""

REFUSES: dict[Layout, dict[str, str]] = {"split": {}, "joint": {}, "mla": mla.REFUSES}
"""By layout: features that it cannot keep, and why."""

__all__ = [
    "EXPRESSES",
    "REFUSES",
    "AttentionWeights",
    "DenseProjections",
    "constant_scale",
    "dense_projections",
    "latent_tensors",
    "linearization_error",
    "linearized_attention",
    "linearized_statistics",
    "mla_tensors",
    "position_free",
    "predicted_loss_increase",
    "query_factors",
    "query_metric",
    "relative_errors",
    "relative_query_error",
    "share",
    "split_blocks",
]
