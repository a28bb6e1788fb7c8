"""Layout `latent`: RoPE kept whole. The latents are cached; keys are rebuilt, biased, normalized and rotated when read.

Tensors of one attention module (R the layer's cached width, n = g_h d_h):
    kv_a_proj.weight [R, D]    x -> latents, all blocks stacked
    k_b_proj.weight  [n, R_k]  key latent -> keys (R_k = R when joint), bias [n] = the source's
    v_b_proj.weight  [n, R_v]  value latent -> values
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from care_mla.linalg import Factors
from care_mla.names import Layout
from care_mla.stats import LayerStatistics

EXPRESSES: dict[str, str] = {
    "qkv bias": "k and v biases are added to the rebuilt keys and values",
    "fused qkv": "the rows of q become q_proj",
    "QK-norm": "keys are rebuilt, then normalized",
    "QK-norm over the projection": "keys are rebuilt, then normalized",
    "attention scale": "the attention module's own",
    "soft-cap": "scores are capped by the source's attention function",
    "attention sinks": "same logits in the source's attention function",
    "sliding window": "same masks; windowed layers cache a window of latents",
    "RoPE scaling": "keys are rotated by the model's own rotary module",
    "length-dependent RoPE": "cosines and sines are cached too: keys stay turned as they were when they came in",
    "partial RoPE": "keys are rebuilt whole, then rotated in part",
    "interleaved RoPE": "keys are rotated by the family's own function",
    "RoPE by layer type": "keys are rotated by their layer's frequencies",
    "layers without RoPE": "keys are not rotated there",
    "tied embeddings": "unchanged",
}
"""Features of a source (`FamilySpec.features`) that these layouts keep, and how. One that is not here cannot be converted."""


def split_blocks(layout: Layout, kv_width: int) -> tuple[slice, ...]:
    """Rows of y = [keys ; values] that each latent of a layout covers."""
    if layout != "split":
        return (slice(0, 2 * kv_width),)
    return (slice(0, kv_width), slice(kv_width, 2 * kv_width))


def latent_tensors(
    factors: Sequence[Factors],
    W: Float[Tensor, "m D"],
    *,
    layout: Layout,
    k_bias: Float[Tensor, "n"] | None = None,
    v_bias: Float[Tensor, "n"] | None = None,
    mean: Float[Tensor, "m"] | None = None,
) -> dict[str, Tensor]:
    """Weights of one converted attention module, by name.

    Args:
        factors: one for each block of the layout.
        W: stacked [W_K ; W_V], m = 2n, float64.
        k_bias, v_bias: the source's; they apply after the rebuilding.
        mean: mu of centred moments. y' = mu + P (y - mu), so (I - P) mu joins the biases: exact, and costs no cache.
    """
    if mean is not None:
        kept_keys, kept_values = constant_part(factors, mean, layout=layout).chunk(2)
        k_bias = kept_keys if k_bias is None else k_bias.double() + kept_keys
        v_bias = kept_values if v_bias is None else v_bias.double() + kept_values
    kv_width = len(W) // 2
    rows = split_blocks(layout, kv_width)
    down = torch.cat([factor.encode @ W[row] for factor, row in zip(factors, rows, strict=True)])
    k_up, v_up = (
        (factors[0].up[:kv_width], factors[0].up[kv_width:]) if layout == "joint" else (factors[0].up, factors[1].up)
    )
    tensors = {"kv_a_proj.weight": down, "k_b_proj.weight": k_up, "v_b_proj.weight": v_up}
    if k_bias is not None:
        tensors["k_b_proj.bias"] = k_bias
    if v_bias is not None:
        tensors["v_b_proj.bias"] = v_bias
    return tensors


@dataclass(frozen=True)
class DenseProjections:
    """Key and value projections of a converted layer written out: what the latents amount to.

    Attributes:
        k, v: [n, D].
        k_bias, v_bias: [n], None where there is none.
    """

    k: Float[Tensor, "n D"]
    v: Float[Tensor, "n D"]
    k_bias: Float[Tensor, "n"] | None
    v_bias: Float[Tensor, "n"] | None


def dense_projections(tensors: Mapping[str, Tensor]) -> DenseProjections:
    """The low-rank edit of the source's weights that `latent_tensors` stand for."""
    down, k_up, v_up = (tensors[f"{name}.weight"] for name in ("kv_a_proj", "k_b_proj", "v_b_proj"))
    return DenseProjections(
        k=k_up @ down[: k_up.shape[1]],
        v=v_up @ down[-v_up.shape[1] :],
        k_bias=tensors.get("k_b_proj.bias"),
        v_bias=tensors.get("v_b_proj.bias"),
    )


def reconstruction_error(factors: Sequence[Factors], width: int, *, layout: Layout) -> Float[Tensor, "m m"]:
    """I - P, block by block: what a conversion loses of y is (I - P)(y - mu)."""
    error = torch.eye(width, dtype=factors[0].up.dtype)
    for factor, rows in zip(factors, split_blocks(layout, width // 2), strict=True):
        error[rows, rows] -= factor.projector()
    return error


def constant_part(factors: Sequence[Factors], mean: Float[Tensor, "m"], *, layout: Layout) -> Float[Tensor, "m"]:
    """(I - P) mu, the part of the mean that the latents do not carry."""
    return reconstruction_error(factors, len(mean), layout=layout) @ mean


def _about(
    second_moment: Float[Tensor, "m m"], plain_mean: Float[Tensor, "m"] | None, mean: Float[Tensor, "m"] | None
) -> Float[Tensor, "m m"]:
    """E[(y - mu)(y - mu)^T] from E[y y^T] and E[y]; mu None is zero."""
    if mean is None:
        return second_moment
    assert plain_mean is not None
    cross = torch.outer(plain_mean, mean)
    return second_moment - cross - cross.T + torch.outer(mean, mean)


def predicted_loss_increase(
    factors: Sequence[Factors],
    statistics: LayerStatistics,
    *,
    layout: Layout,
    mean: Float[Tensor, "m"] | None = None,
    carried: Float[Tensor, "m m"] | None = None,
) -> float:
    """Loss increase of converting this layer alone, in nats per token, to second order: tr(H E M E^T) / 2, E = I - P.

    H and M are the plain Fisher statistics, neither tempered nor shrunk, whatever metric chose the factors. Layers add up;
    errors of different tokens, and of layers on top of each other, are taken as independent.

    Args:
        statistics: with Fisher statistics.
        mean: mu given back as a constant, if the conversion was centred.
        carried: B where the latent carries B y, not y; what B leaves out costs nothing here.
    """
    fisher = statistics.fisher
    assert fisher is not None
    deviation = _about(fisher.second_moment, fisher.mean, mean)
    error = reconstruction_error(factors, len(deviation), layout=layout)
    error = error if carried is None else error @ carried
    curvature = fisher.curvature(statistics.moments.second_moment)
    return 0.5 * float(((curvature @ error) * (error @ deviation)).sum())


def relative_errors(
    factors: Sequence[Factors],
    second_moment: Float[Tensor, "m m"],
    *,
    layout: Layout,
    plain_mean: Float[Tensor, "m"] | None = None,
    mean: Float[Tensor, "m"] | None = None,
    carried: Float[Tensor, "m m"] | None = None,
) -> tuple[float, float]:
    """E||y - y'||^2 / E||y||^2 of the keys and of the values: one yardstick for every method.

    Args:
        second_moment, plain_mean: E[y y^T] and E[y], neither shrunk nor weighted.
        mean: mu given back as a constant, if the conversion was centred.
        carried: B where the latent carries B y, not y.
    """
    deviation = _about(second_moment, plain_mean, mean)
    error = reconstruction_error(factors, len(second_moment), layout=layout)
    error = error if carried is None else error @ carried
    lost, total = (error @ deviation @ error.T).diagonal(), second_moment.diagonal()
    keys, values = split_blocks("split", len(second_moment) // 2)
    return share(lost[keys], total[keys]), share(lost[values], total[values])


def share(part: Tensor, whole: Tensor) -> float:
    """sum(part) / sum(whole); of nothing, nothing is lost: 0."""
    total = float(whole.sum())
    return float(part.sum()) / total if total else 0.0
