"""Layout `mla`: a shared rotary key and one latent for the position-free keys and the values (DeepSeek's attention).

One file, as every layout is.

Tensors of one attention module (R latent width, P rotary pairs, d head width, n = g_h d, n_h query heads):
    kv_a_proj_with_mqa.weight [R + 2P, D]      x -> latent and rotary key (P real parts, then P imaginary parts)
    kv_a_proj_with_mqa.bias   [R + 2P]         the rotary key's share of a k bias; zero on the latent
    kv_b_proj.weight          [n_h 2d, R]      latent -> each query head's position-free key and value
    q_proj.weight             [n_h (d + 2P), D]  each head's position-free query and rotary query
    o_proj.bias               [D]              what constants of the values amount to

With `--q-lora-rank` r (`conversion.queries`), q_proj is two maps, a bias of the queries on the second:
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

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from care_mla.errors import ConfigError, RankError
from care_mla.families.entries import malformed
from care_mla.geometry import Geometry
from care_mla.layouts.base import AttentionWeights, LatentContent, Layout, Options, SourceFacts
from care_mla.layouts.features import MLA_KEEPS, MLA_REFUSES
from care_mla.linalg import Factors
from care_mla.methods import Metric
from care_mla.rope import (
    RotarySelection,
    complex_moment,
    components,
    dropped_rotation,
    half_split_heads,
    predicted_rotation_loss,
    select,
)
from care_mla.stats import LayerStatistics

ROTARY_WIDTHS = (16, 32, 48, 64, 96, 128)
"""Widths of the rotary key that are compared where none is given."""

LATENT_LOSS_WEIGHT = 4.0
"""How much more a predicted loss of the latent counts than one of dropped rotations when widths are compared: on held-out text
the first came out too low, the second too high (docs/results/mla-choices.md); 3 to 6 choose the same widths."""


@dataclass(frozen=True)
class RotaryContent(LatentContent):
    """Position-free keys and values.

    Attributes:
        selection: the pairs that stay rotary, beside the latent.
    """

    selection: RotarySelection = field(kw_only=True)


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


class Mla(Layout):
    """DeepSeek's attention: what stock classes and engines run, and the cheapest to decode."""

    name = "mla"
    blocks = ("kv",)
    keeps = MLA_KEEPS
    refuses = MLA_REFUSES
    options = frozenset({"rope", "freq_fold", "qk_rope_head_dim", "context", "q_lora_rank", "qk_norm"})
    attention = "care_mla.modeling.mla_attention:MlaAttention"
    caches_positions = False
    exports = ("deepseek-v3",)

    def candidates(self, facts: SourceFacts, options: Options, *, predicts_loss: bool) -> list[dict[str, Any]]:
        """One for every rotary width that may be chosen, with the frequencies that it folds."""
        geometry = facts.geometry
        if options["qk_rope_head_dim"] is not None:
            widths = [options["qk_rope_head_dim"]]
        elif not predicts_loss:
            widths = [geometry.head_dim]
        else:
            widths = [width for width in ROTARY_WIDTHS if width <= geometry.kv_width]
            if options["rope"] != "free":
                widths = [width for width in widths if geometry.head_dim % width == 0]
            widths = widths or [geometry.head_dim]
        return [
            {
                "qk_rope_head_dim": width,
                "freq_fold": options["freq_fold"] or default_freq_fold(options["rope"], width, geometry),
            }
            for width in widths
        ]

    def candidate_name(self, options: Options) -> str:
        return str(options["qk_rope_head_dim"])

    def price(self, losses: Mapping[str, float]) -> float:
        return losses["rotation"] + LATENT_LOSS_WEIGHT * losses["latent"]

    def require_options(self, facts: SourceFacts, options: Options) -> None:
        geometry, fold, rank = facts.geometry, options["freq_fold"], options["q_lora_rank"]
        if options["qk_norm"] == "linear" and "QK-norm" not in facts.features:
            raise ConfigError("--qk-norm linear needs a model with QK-norm, which this one has not; leave it out")
        queries = geometry.num_heads * geometry.head_dim
        if rank is not None and rank > min(geometry.hidden_size, queries):
            raise RankError(
                f"--q-lora-rank {rank} is outside 1..{min(geometry.hidden_size, queries)} (hidden size {geometry.hidden_size}, "
                f"{queries} outputs of all query heads)"
            )
        frequencies = geometry.head_dim // 2
        if fold is not None and fold > 1 and (options["rope"] == "free" or frequencies % fold):
            raise ConfigError(
                f"--freq-fold {fold} needs --rope stock or transmla, and must divide the {frequencies} frequencies of a head"
            )

    def acting(self, facts: SourceFacts, options: Options) -> frozenset[str]:
        acting = {"rope", "qk_rope_head_dim", "context"}
        if options["rope"] != "free":
            acting.add("freq_fold")
        if options["q_lora_rank"] is not None:
            acting |= {"q_lora_rank", "shrinkage"}
        if "QK-norm" in facts.features:
            acting.add("qk_norm")
        if options["qk_norm"] == "linear":
            acting.add("centre")  # of the regression
        return frozenset(acting)

    def cached_beside(self, facts: SourceFacts, options: Options) -> dict[str, int]:
        scales = {"key_scales": facts.geometry.num_kv_heads} if self.normalizes_outside(facts, options) else {}
        return {"qk_rope_head_dim": options["qk_rope_head_dim"], **scales}

    def normalizes_outside(self, facts: SourceFacts, options: Options) -> bool:
        return "QK-norm" in facts.features and options["qk_norm"] == "exact"

    def rows(self, kv_width: int) -> tuple[slice, ...]:
        return (slice(0, 2 * kv_width),)

    def content(self, metric: Metric, facts: SourceFacts, options: Options) -> RotaryContent:
        """Position-free keys and values: which pairs stay rotary is decided by what dropping their rotation costs."""
        head_dim, fold = facts.geometry.head_dim, options["freq_fold"]
        keys = metric.block(slice(0, facts.geometry.kv_width))
        about_zero = keys.second_moment
        if keys.mean is not None:  # the mean of a key turns too, and position-free it would be lost in softmax
            about_zero = about_zero + torch.outer(keys.mean, keys.mean)
        moment = complex_moment(about_zero, head_dim, fold)
        weights = None if keys.output_metric is None else complex_moment(keys.output_metric.matrix, head_dim, fold)
        if options["rope"] == "transmla":
            moment, weights = moment.real.to(moment.dtype), None
        selection = select(
            components(moment, weights),
            self._rotation_cost(facts, options),
            options["qk_rope_head_dim"] // 2,
            facts.geometry.num_kv_heads,
            options["rope"],
        )
        return RotaryContent(position_free(selection), selection=selection)

    def predicted_losses(
        self,
        factors: Sequence[Factors],
        statistics: LayerStatistics,
        content: LatentContent,
        mean: Tensor | None,
        facts: SourceFacts,
        options: Options,
    ) -> dict[str, float]:
        """As `Layout.predicted_losses`; "rotation" is what pairs cost that no longer turn."""
        assert statistics.fisher is not None and isinstance(content, RotaryContent)
        losses = super().predicted_losses(factors, statistics, content, mean, facts, options)
        keys = slice(0, facts.geometry.kv_width)
        curvature = statistics.fisher.curvature(statistics.moments.second_moment)[keys, keys]
        moment = statistics.fisher.second_moment[keys, keys]
        cost = self._rotation_cost(facts, options)
        return losses | {"rotation": predicted_rotation_loss(content.selection, cost, curvature, moment)}

    def tensors(
        self,
        weights: AttentionWeights,
        factors: Sequence[Factors],
        content: LatentContent,
        mean: Tensor | None,
        geometry: Geometry,
        queries: Factors | None = None,
    ) -> dict[str, Tensor]:
        assert isinstance(content, RotaryContent)
        return mla_tensors(
            weights,
            content.selection,
            factors[0],
            num_kv_heads=geometry.num_kv_heads,
            head_dim=geometry.head_dim,
            mean=mean,
            queries=queries,
        )

    def config_entries(
        self,
        ranks: Sequence[Sequence[int]],
        biases: Collection[str],
        contents: Sequence[LatentContent],
        options: Options,
    ) -> dict[str, Any]:
        selections = [content.selection for content in contents if isinstance(content, RotaryContent)]
        return super().config_entries(ranks, biases, contents, options) | {
            "k_bias": "kv_a_proj_with_mqa.bias" in biases,
            "o_bias": "o_proj.bias" in biases,
            "q_lora_rank": options["q_lora_rank"],
            "q_bias": bool({"q_proj.bias", "q_b_proj.bias"} & set(biases)),
            "qk_norm": options["qk_norm"],
            "rope_frequencies": [selection.frequencies.tolist() for selection in selections],
        }

    def require_entries(self, config: Any) -> None:
        super().require_entries(config)
        turned = config.rope_frequencies
        if turned is None or len(turned) != config.num_hidden_layers or not all(turned) or min(map(min, turned)) < 0:
            raise malformed("rope_frequencies", turned, "a list of indices for every layer")

    @staticmethod
    def _rotation_cost(facts: SourceFacts, options: Options) -> Tensor:
        return _rotation_cost(tuple(facts.frequencies().tolist()), options["context"])


@lru_cache(maxsize=8)
def _rotation_cost(frequencies: tuple[float, ...], context: int) -> Tensor:
    return dropped_rotation(torch.tensor(frequencies, dtype=torch.float64), context)


def default_freq_fold(rope: str, qk_rope_head_dim: int, geometry: Geometry) -> int:
    """Adjacent frequencies to treat as one: a frequency that no rotary pair has would stand still, so it folds with one that has."""
    frequencies = geometry.head_dim // 2
    step = frequencies // (qk_rope_head_dim // 2)
    if rope != "stock" or frequencies * geometry.num_kv_heads <= qk_rope_head_dim // 2:
        return 1
    fold = max(2, step)
    return fold if frequencies % fold == 0 else 1


MLA = Mla()
