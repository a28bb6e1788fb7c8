"""Half-split RoPE in complex form.

A head of width d holds F = d/2 pairs (x_f, x_{f+F}), read as z_f = x_f + i x_{f+F}. Rotating by position p multiplies z_f by
exp(i p theta_f), and a score is sum_f Re(conj(q_f) z_f). Stacked over the g kv heads, the keys of one frequency are a vector
in C^g; every complex matrix acting on it commutes with the rotation.
"""

from __future__ import annotations

import torch
from jaxtyping import Complex, Float
from torch import Tensor


def half_split_heads(x: Float[Tensor, "*batch n"], head_dim: int) -> Complex[Tensor, "*batch g F"]:
    """Real vectors over all heads -> complex pairs by head and frequency."""
    heads = x.reshape(*x.shape[:-1], -1, 2, head_dim // 2)
    return torch.complex(heads[..., 0, :], heads[..., 1, :])


def complex_moment(moment: Float[Tensor, "n n"], head_dim: int, fold: int = 1) -> Complex[Tensor, "folds k k"]:
    """E[z z^H] of every fold of adjacent frequencies from the real second moment of the stacked heads.

    The vector of a fold holds its frequencies' heads, frequency by frequency: k = fold * g. The part that a complex-linear
    map cannot use (E[z z^T]) is dropped.
    """
    heads, folds = len(moment) // head_dim, head_dim // 2 // fold
    pairs = moment.reshape(heads, 2, folds, fold, heads, 2, folds, fold)
    same = torch.einsum("hafmkbfn->fmhnkab", pairs)
    same = same.reshape(folds, fold * heads, fold * heads, 2, 2)
    return torch.complex(same[..., 0, 0] + same[..., 1, 1], same[..., 1, 0] - same[..., 0, 1])


def real_map(maps: Complex[Tensor, "folds k k"], heads: int) -> Float[Tensor, "n n"]:
    """The real matrix on stacked half-split heads that multiplies every fold's vector by its complex matrix."""
    folds, fold = len(maps), maps.shape[-1] // heads
    blocks = torch.stack(
        [torch.stack([maps.real, -maps.imag], -1), torch.stack([maps.imag, maps.real], -1)], -2
    )  # [folds, k, k, out, in]
    blocks = blocks.reshape(folds, fold, heads, fold, heads, 2, 2)
    diagonal = torch.zeros(heads, 2, folds, fold, heads, 2, folds, fold, dtype=maps.real.dtype)
    index = torch.arange(folds)
    diagonal[:, :, index, :, :, :, index, :] = blocks.permute(0, 2, 5, 1, 4, 6, 3)
    width = heads * 2 * folds * fold
    return diagonal.reshape(width, width)
