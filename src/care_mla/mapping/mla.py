"""Layout `mla`: a shared rotary key and one latent for the position-free keys and the values (DeepSeek's attention).

Tensors of one attention module (R latent width, P rotary pairs, d head width, n = g_h d, n_h query heads):
    kv_a_proj_with_mqa.weight [R + 2P, D]      x -> latent and rotary key (P real parts, then P imaginary parts)
    kv_a_proj_with_mqa.bias   [R + 2P]         the rotary key's share of a k bias; zero on the latent
    kv_b_proj.weight          [n_h 2d, R]      latent -> each query head's position-free key and value
    q_proj.weight             [n_h (d + 2P), D]  each head's position-free query and rotary query
    o_proj.bias               [D]              what constants of the values amount to

With `--q-lora-rank` r (`mapping.queries`), q_proj is two maps, a bias of the queries on the second:
    q_a_proj.weight           [r, D]           x -> latent of all queries
    q_b_proj.weight           [.., r]          what q_proj.weight would be, of that latent

With QK-norm, keys are k / rms(k) * w: w is folded into the maps, 1 / rms(k) is cached, one scale a kv head, and multiplies scores.
Latents are made of keys as large as the normalized ones: of S k, S = w times 1 / rms of the head on average, which decoding takes back.
Queries are normalized before they are split, so their projection stays the source's:
    q_proj.weight             [n_h d, D]       the source's
    q_rope.weight             [g 2P, d]        normalized query of a head group -> rotary query
    k_proj.weight             [n, D]           the source's, for the scales of new tokens
    k_constant                [n]              constant of the position-free keys, to which a scaled softmax is not blind
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from care_mla.linalg import Factors
from care_mla.rope import RotarySelection, half_split_heads

EXPRESSES: dict[str, str] = {
    "qkv bias": "the rotary key keeps its bias, softmax is blind to that of the position-free keys, the values' joins o_proj",
    "fused qkv": "q, k and v are read from their rows",
    "attention scale": "the attention module's own",
    "sliding window": "same masks; windowed layers cache a window",
    "RoPE scaling": "the rotary key is turned by the model's own rotary module",
    "tied embeddings": "unchanged",
    "QK-norm": "one scale a kv head is cached and multiplies scores; or linearized, approximately (`--qk-norm linear`)",
}

REFUSES: dict[str, str] = {
    "QK-norm over the projection": "the cached scales are those of heads; a norm over all of them is not built",
    "soft-cap": "constants of the position-free keys are left to softmax, which is not blind to them once scores are capped",
    "attention sinks": "constants of the values move into o_proj's bias, and beside a sink the attention weights do not sum to one",
    "length-dependent RoPE": "it changes the frequencies with the length, so no rotary pair can be chosen",
    "partial RoPE": "rotary pairs are chosen among those of the whole head",
    "interleaved RoPE": "rotary pairs are read across the halves of a head",
    "RoPE by layer type": "rotary pairs are chosen by one set of frequencies",
    "layers without RoPE": "their shared key would be turned",
}
"""Features that this layout cannot keep -> why."""


@dataclass(frozen=True)
class AttentionWeights:
    """Projections of a source attention in torch orientation, float64.

    Attributes:
        q, k, v: [n_h d, D], [n, D], [n, D]; o: [D, n_h d]; biases or None.
        q_norm, k_norm: [d] weights of the norms of queries and keys, None without QK-norm.
        k_size: [n], rms of each key's head on average over calibration text; None: ones.
    """

    q: Float[Tensor, "nq D"]
    k: Float[Tensor, "n D"]
    v: Float[Tensor, "n D"]
    o: Float[Tensor, "D nq"]
    q_bias: Float[Tensor, "nq"] | None = None
    k_bias: Float[Tensor, "n"] | None = None
    v_bias: Float[Tensor, "n"] | None = None
    o_bias: Float[Tensor, "D"] | None = None
    q_norm: Float[Tensor, "d"] | None = None
    k_norm: Float[Tensor, "d"] | None = None
    k_size: Float[Tensor, "n"] | None = None

    @property
    def keys_and_values(self) -> Float[Tensor, "m D"]:
        """[W_K ; W_V], m = 2n."""
        return torch.cat([self.k, self.v])

    def key_scale(self) -> Float[Tensor, "n"]:
        """diag of S: what the keys' norm multiplies them by on average; ones without QK-norm."""
        n = len(self.k)
        weight = self.k.new_ones(n) if self.k_norm is None else self.k_norm.repeat(n // len(self.k_norm))
        return weight if self.k_size is None else weight / self.k_size


def _real_then_imaginary(z: Complex[Tensor, "... P"]) -> Float[Tensor, "... P2"]:
    return torch.cat([z.real, z.imag], dim=-1)


def rotary_queries(
    q: Float[Tensor, "nq *D"], selection: RotarySelection, num_kv_heads: int, head_dim: int
) -> Float[Tensor, "n_h P2 *D"]:
    """Each head's queries for the shared rotary key: sum_m conj(decoder[p, m, group]) q_m for pair p."""
    heads = half_split_heads(q.movedim(0, -1), head_dim)  # [*D, n_h, F]
    group = torch.arange(heads.shape[-2]) // (heads.shape[-2] // num_kv_heads)
    mixed = (heads[..., selection.sources] * selection.decoder.conj().movedim(-1, 0)[group]).sum(-1)
    return _real_then_imaginary(mixed).movedim((-2, -1), (0, 1)).contiguous()


def rotary_key(k: Float[Tensor, "n *D"], selection: RotarySelection, head_dim: int) -> Float[Tensor, "P2 *D"]:
    """The shared rotary key: encoder[p] applied to the heads' keys of pair p's frequencies."""
    heads = half_split_heads(k.movedim(0, -1), head_dim)[..., selection.sources]  # [*D, g, P, M]
    return _real_then_imaginary((heads * selection.encoder.movedim(-1, 0)).sum((-3, -1))).movedim(-1, 0).contiguous()


def position_free(selection: RotarySelection) -> Float[Tensor, "m m"]:
    """B with B [k ; v] = [rest k ; v], the outputs that the latent must carry."""
    n = len(selection.rest)
    both = torch.eye(2 * n, dtype=selection.rest.dtype)
    both[:n, :n] = selection.rest
    return both


def mla_tensors(
    source: AttentionWeights,
    selection: RotarySelection,
    factors: Factors,
    *,
    num_kv_heads: int,
    head_dim: int,
    mean: Float[Tensor, "m"] | None = None,
    queries: Factors | None = None,
) -> dict[str, Tensor]:
    """Weights of one converted attention module, by name.

    Args:
        factors: of [rest k ; v], see `position_free`.
        mean: mu of centred moments of [k ; v]. Softmax is blind to a constant in the position-free keys (not with QK-norm:
            `k_constant`); the constant of the values moves into o_proj's bias, exactly, since attention weights sum to one.
        queries: of the source's q without its bias, where they are to be of low rank; None keeps them exact.

    With QK-norm, selection, factors and mean are those of [S k ; v], see `AttentionWeights.key_scale`.
    """
    n = len(source.k)
    num_heads = len(source.q) // head_dim
    group = torch.arange(num_heads) // (num_heads // num_kv_heads)
    scale = source.key_scale()
    keys, k_bias = scale[:, None] * source.k, None if source.k_bias is None else scale * source.k_bias
    stacked = torch.cat([selection.rest @ keys, source.v])
    down = torch.cat([factors.encode @ stacked, rotary_key(keys, selection, head_dim)])
    size = source.k.new_ones(n) if source.k_size is None else source.k_size
    ups = [part.view(num_kv_heads, head_dim, -1)[group] for part in (size[:, None] * factors.up[:n], factors.up[n:])]
    q, of_queries = (source.q, "q_proj") if queries is None else (queries.up, "q_b_proj")
    tensors = {} if queries is None else {"q_a_proj.weight": queries.encode @ source.q}
    tensors |= {
        "kv_a_proj_with_mqa.weight": down,
        "kv_b_proj.weight": torch.cat(ups, dim=1).flatten(0, 1),
        f"{of_queries}.weight": torch.cat(
            [q.view(num_heads, head_dim, -1), rotary_queries(q, selection, num_kv_heads, head_dim)], dim=1
        ).flatten(0, 1),
        "o_proj.weight": source.o,
    }
    if source.q_bias is not None:
        rotary = rotary_queries(source.q_bias, selection, num_kv_heads, head_dim)
        tensors[f"{of_queries}.bias"] = torch.cat([source.q_bias.view(num_heads, head_dim), rotary], dim=1).flatten()
    if k_bias is not None:
        latent = torch.zeros(len(factors.encode), dtype=down.dtype)
        tensors["kv_a_proj_with_mqa.bias"] = torch.cat([latent, rotary_key(k_bias, selection, head_dim)])
    constant = torch.zeros(n, dtype=down.dtype) if source.v_bias is None else source.v_bias
    k_constant = torch.zeros_like(constant) if k_bias is None else selection.rest @ k_bias
    if mean is not None:
        centre = torch.cat([selection.rest @ mean[:n], mean[n:]])
        kept_keys, kept_values = (centre - factors.projector() @ centre).chunk(2)
        constant, k_constant = constant + kept_values, k_constant + kept_keys
    if source.k_norm is not None:
        one_head_each = size[:, None] * torch.eye(head_dim, dtype=down.dtype).repeat(num_kv_heads, 1)
        tensors |= {
            f"{of_queries}.weight": q,
            "q_rope.weight": rotary_queries(one_head_each, selection, num_kv_heads, head_dim).flatten(0, 1),
            "k_proj.weight": source.k,
            "k_constant": size * k_constant,
        }
        tensors |= {} if source.q_bias is None else {f"{of_queries}.bias": source.q_bias}
        tensors |= {} if source.k_bias is None else {"k_proj.bias": source.k_bias}
    if mean is not None or source.v_bias is not None or source.o_bias is not None:
        by_head = constant.view(num_kv_heads, head_dim)[group].flatten()
        tensors["o_proj.bias"] = source.o @ by_head + (0.0 if source.o_bias is None else source.o_bias)
    return tensors
