"""Factors to checkpoint tensors, one file a target layout."""

from care_mla.mapping.latent import (
    EXPRESSES,
    DenseProjections,
    dense_projections,
    latent_tensors,
    predicted_loss_increase,
    relative_errors,
    split_blocks,
)

__all__ = [
    "EXPRESSES",
    "DenseProjections",
    "dense_projections",
    "latent_tensors",
    "predicted_loss_increase",
    "relative_errors",
    "split_blocks",
]
