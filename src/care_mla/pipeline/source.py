"""A model on disk that can be converted, its weights not yet read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from care_mla.checkpoint import CheckpointReader, resolve_source
from care_mla.checkpoint.storage import require_plain_tensor, require_unquantized
from care_mla.errors import CheckpointError, UnsupportedModelError
from care_mla.families import FamilySpec, get_family
from care_mla.families.spec import Projection
from care_mla.files import read_json
from care_mla.geometry import Geometry
from care_mla.mapping import EXPRESSES, REFUSES, AttentionWeights
from care_mla.names import Layout

PROJECTIONS: tuple[Projection, ...] = ("q", "k", "v", "o")


@dataclass(frozen=True)
class Source:
    """A model on disk, its weights not yet read.

    Attributes:
        reader: what transformers loads, under the names of the family's CausalLM, however they are stored.
        dtype: that transformers loads it in.
    """

    name: str
    directory: Path
    reader: CheckpointReader
    family: FamilySpec
    geometry: Geometry
    dtype: torch.dtype

    def projection(self, layer: int, projection: Projection) -> tuple[Tensor, Tensor | None]:
        """Weight [n, D] ([D, n] of o) and bias (or None) of a projection, as stored."""
        module, rows = self.family.stored(projection, self.geometry)
        prefix = f"{self.family.attention_name(layer)}.{module}"
        whole, bias = self.reader[f"{prefix}.weight"], self.reader.get(f"{prefix}.bias")
        for name, tensor in (("weight", whole), ("bias", bias)):
            if tensor is not None and not torch.isfinite(tensor).all():
                raise CheckpointError(
                    f"{prefix}.{name} holds NaN or infinite numbers; the checkpoint is damaged, download it again"
                )
        weight = whole[rows]
        queries = self.geometry.num_heads * self.geometry.head_dim
        n, hidden = (self.geometry.kv_width if projection in ("k", "v") else queries), self.geometry.hidden_size
        if weight.shape != ((hidden, n) if projection == "o" else (n, hidden)) or (rows.stop or 0) > len(whole):
            raise CheckpointError(
                f"{prefix}.weight has shape {tuple(whole.shape)}, config.json asks for {n} outputs of {projection} in it and hidden size {hidden}"
            )
        return weight, None if bias is None else bias[rows]

    def stacked_weights(self, layer: int) -> Tensor:
        """W = [W_K ; W_V], [2n, D] float64."""
        return torch.cat([self.projection(layer, "k")[0].double(), self.projection(layer, "v")[0].double()])

    def attention(self, layer: int) -> AttentionWeights:
        """All projections of one attention, float64. Norms that add one to their weight (Gemma) are refused in layout mla."""
        stored = {part: self.projection(layer, part) for part in PROJECTIONS}
        q, k, v, o = (weight.double() for weight, _ in stored.values())
        q_bias, k_bias, v_bias, o_bias = (None if bias is None else bias.double() for _, bias in stored.values())
        q_norm, k_norm = (self._norm(layer, name) for name in (self.family.q_norm, self.family.k_norm))
        return AttentionWeights(q, k, v, o, q_bias, k_bias, v_bias, o_bias, q_norm, k_norm)

    def _norm(self, layer: int, name: str | None) -> Tensor | None:
        """Weight [d] of a norm of queries or keys, float64; None without QK-norm."""
        return None if name is None else self.reader[f"{self.family.attention_name(layer)}.{name}.weight"].double()


def open_source(source: str | Path) -> Source:
    """Resolve SOURCE and check, without reading weights, that transformers loads it and that it can be converted.

    Raises:
        CheckpointError, UnsupportedModelError
    """
    from care_mla.modeling import require_buildable

    directory = resolve_source(source)
    config = read_json(directory / "config.json")
    family = get_family(config)
    require_unquantized(directory, config)
    require_expressible(family, config)
    require_buildable(config)
    geometry = family.geometry(config)
    reader, dtype = _as_loaded(CheckpointReader(directory), family, geometry)
    return Source(str(source), directory, reader, family, geometry, dtype)


def _as_loaded(
    reader: CheckpointReader, family: FamilySpec, geometry: Geometry
) -> tuple[CheckpointReader, torch.dtype]:
    """What transformers loads of a checkpoint, and in which dtype.

    Raises:
        CheckpointError: weights are missing, doubled, of another shape, or stored for an attention that has none of that name.
        UnsupportedModelError: quantized weights.
    """
    from care_mla.modeling import take_inventory

    directory = reader.directory
    found = take_inventory(directory, {name: tensor.shape for name, tensor in reader.stored.items()})
    for name in found.names.values():
        require_plain_tensor(directory, name, reader.stored[name].dtype, loaded=True)
    for name, is_old_buffer in found.ignored.items():
        if not is_old_buffer:
            require_plain_tensor(directory, name, reader.stored[name].dtype, loaded=False)
    for name, (shape, stored) in found.mismatched.items():
        raise CheckpointError(
            f"{directory}: {stored} has shape {reader.stored[stored].shape}, config.json asks for {shape} of {name}; one of the two belongs to another model"
        )
    if found.missing:
        shared = set(found.missing) <= found.shareable
        hint = (
            "; if the model shares it with another weight, config.json must say so (tie_word_embeddings)"
            if shared
            else ""
        )
        raise CheckpointError(
            f"{directory} has no {found.missing[0]}, which this {family.model_type} model needs ({len(found.missing)} such); the checkpoint is incomplete, "
            f"or of another architecture than config.json says{hint}"
        )
    attentions = tuple(f"{family.attention_name(layer)}." for layer in range(geometry.num_layers))
    unprefixed = tuple(name.partition(".")[2] for name in attentions)
    unread = [
        name
        for name, is_old_buffer in found.ignored.items()
        if not is_old_buffer and name.startswith(attentions + unprefixed)
    ]
    if unread:
        raise CheckpointError(
            f"{directory}: {unread[0]} is stored, but the attention that config.json describes has no such weight, and transformers would leave it "
            f"out ({len(unread)} such); remove it, or correct config.json (a bias needs its entry, such as attention_bias)"
        )
    changed = [name for name in found.converted if name.startswith(attentions)]
    if changed:
        raise UnsupportedModelError(
            f"{directory}: transformers rewrites {changed[0]} while it loads, so the stored weights are not the ones a conversion needs; load the model "
            "with transformers, call save_pretrained(..., save_original_format=False), and convert what that writes"
        )
    return reader.renamed(found.names), found.dtype or reader.first_dtype


def lost_features(family: FamilySpec, config: dict[str, Any], layout: Layout) -> list[str]:
    """Features of a source that a layout would drop."""
    return [feature for feature in family.features(config) if feature not in EXPRESSES[layout]]


def require_expressible(family: FamilySpec, config: dict[str, Any], layout: Layout = "joint") -> None:
    """Refuse a source with a feature that a layout would drop.

    Raises:
        UnsupportedModelError
    """
    if lost := lost_features(family, config, layout):
        able = [name for name, kept in EXPRESSES.items() if set(lost) <= set(kept)]
        hint = f"; choose --layout {' or '.join(able)}" if able else ""
        because = "; ".join(REFUSES[layout][feature] for feature in lost if feature in REFUSES[layout])
        raise UnsupportedModelError(
            f"this {family.model_type} model has {', '.join(lost)}, which layout {layout} cannot express{hint}"
            + (f" ({because})" if because else "")
        )
