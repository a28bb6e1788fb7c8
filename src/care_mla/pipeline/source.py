"""Opens a source: everything that transformers would refuse or read otherwise is found before weights are read."""

from __future__ import annotations

from pathlib import Path

import torch

from care_mla.checkpoint import CheckpointReader, resolve_source
from care_mla.checkpoint.storage import require_plain_tensor, require_unquantized
from care_mla.conversion.source import Source
from care_mla.errors import CheckpointError, UnsupportedModelError
from care_mla.families import FamilySpec, get_family
from care_mla.files import read_json
from care_mla.geometry import Geometry
from care_mla.layouts import JOINT, require_expressible


def open_source(source: str | Path) -> Source:
    """Resolve SOURCE and check, without reading weights, that transformers loads it and that it can be converted.

    Raises:
        CheckpointError, UnsupportedModelError
    """
    from care_mla.modeling import require_buildable, rotary_frequencies

    directory = resolve_source(source)
    config = read_json(directory / "config.json")
    family = get_family(config)
    require_unquantized(directory, config)
    require_expressible(family.features(config), JOINT, family.model_type)  # which keeps the most
    require_buildable(config)
    geometry = family.geometry(config)
    reader, dtype = _as_loaded(CheckpointReader(directory), family, geometry)
    return Source(
        str(source), directory, reader, family, geometry, dtype, frequencies=lambda: rotary_frequencies(config)
    )


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
