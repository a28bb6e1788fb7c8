"""Factors to checkpoint tensors, one file a target layout."""

from care_mla.mapping.latent import EXPRESSES, latent_tensors, relative_errors, split_blocks

__all__ = ["EXPRESSES", "latent_tensors", "relative_errors", "split_blocks"]
