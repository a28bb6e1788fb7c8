"""Export: layout mla as a checkpoint of a stock class."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor

from care_mla.checkpoint import CheckpointReader, Kind, ShardedWriter, claim, copy_side_files, require_output
from care_mla.errors import CheckpointError, ConfigError, UnsupportedModelError
from care_mla.export.deepseek import (
    EMBEDDING,
    REQUIRED,
    attention_tensors,
    converted_features,
    deepseek_config,
    padded_rank,
    query_weights,
    require_holdable,
    require_stock_frequencies,
    residual_scale,
)
from care_mla.export.engines import Engine
from care_mla.families import FamilySpec, get_family
from care_mla.families.entries import malformed
from care_mla.files import write_json
from care_mla.geometry import Geometry
from care_mla.layouts import LAYOUTS
from care_mla.pipeline.inputs import inputs_of
from care_mla.progress import Track, shown
from care_mla.records.artifacts import EXPORT, versions

EXPORT_TARGETS = ("deepseek-v3",)
"""Stock classes that `export` writes for."""


def export(
    converted: str | Path,
    out: str | Path,
    *,
    target: str = "deepseek-v3",
    engine: str = "transformers",
    kv_lora_rank: int | None = None,
    overwrite: bool = False,
    track: Track = shown,
) -> dict[str, Any]:
    """Write a model of layout mla as a checkpoint of a stock class, which loads with no custom code.

    Args:
        converted: directory that `convert` wrote, with rope="stock".
        target: one of `EXPORT_TARGETS`.
        engine: "transformers" takes any latent width, "vllm" what its kernels do and no biases or RoPE scaling.
        kv_lora_rank: pad all latents to this width; None: as little as the engine allows.

    Returns:
        What was written: architecture, widths, share of the cache saved, notes; saved in `out` too.

    Raises:
        ConversionError: nothing is left at `out` then.
    """
    if target not in EXPORT_TARGETS:
        raise ConfigError(f"unknown --target {target!r}; choose one of {', '.join(EXPORT_TARGETS)}")
    if engine not in get_args(Engine):
        raise ConfigError(f"unknown --engine {engine!r}; choose one of {', '.join(get_args(Engine))}")
    directory, out = Path(converted), Path(out)
    inputs = inputs_of(source=directory)
    require_output(out, Kind.EXPORTED, inputs, overwrite=overwrite)
    reader = CheckpointReader(directory)
    plan = _ExportPlan.make(reader.config, str(directory), target, cast(Engine, engine), kv_lora_rank)
    with (
        claim(out, Kind.EXPORTED, inputs, overwrite=overwrite) as claimed,
        claimed.staging(reader.num_bytes) as staging,
    ):
        record = _write_export(plan, reader, staging, track)
        copy_side_files(directory, staging)
        write_json(staging / "config.json", plan.config)
        write_json(staging / EXPORT, {**record, "versions": versions()})
    return record


@dataclass(frozen=True)
class _ExportPlan:
    """Everything about an export that is decided before weights are read."""

    family: FamilySpec
    geometry: Geometry
    ranks: list[int]
    eps: float
    attention_scaling: float
    required: tuple[str, ...]
    config: dict[str, Any]

    @classmethod
    def make(
        cls, config: dict[str, Any], name: str, target: str, engine: Engine, kv_lora_rank: int | None
    ) -> _ExportPlan:
        from care_mla.modeling import complete_config, matching_rotation, skeleton

        layout = LAYOUTS.get(config.get("layout", ""))
        if layout is None or target not in layout.exports:
            able = " or ".join(other.name for other in LAYOUTS.values() if target in other.exports)
            raise CheckpointError(
                f"{name} is not a model of layout {able}; make one with `care convert --layout {able} --rope stock`"
            )
        skeleton(config)  # what follows reads entries that fit each other
        config = complete_config(config)
        if config["dtype"] is None:
            raise malformed("dtype", None, "the dtype of the weights")
        source = complete_config(config["text_config"])
        family = get_family(source)
        geometry = family.geometry(source)
        if target not in family.exports:
            raise UnsupportedModelError(
                f"the decoder layers of {family.model_type} are not those of {target}; serve {name} itself, with care_mla's classes"
            )
        features = converted_features(family.features(source), config)
        require_holdable(features, engine=engine, dtype=config["dtype"], o_bias=config["o_bias"])
        frequencies, ranks = config["rope_frequencies"], config["kv_lora_rank"]
        require_stock_frequencies(frequencies, geometry.head_dim // 2)
        query_bias = "qkv bias" in features
        exported = deepseek_config(
            source,
            kv_lora_rank=padded_rank(ranks, 2 * len(frequencies[0]), engine, kv_lora_rank),
            qk_rope_head_dim=2 * len(frequencies[0]),
            num_heads=geometry.num_heads,
            head_dim=geometry.head_dim,
            biased=query_bias or config["o_bias"] or config["k_bias"],
            query_bias=query_bias,
            dtype=config["dtype"],
            q_lora_rank=config.get("q_lora_rank"),
        )
        required = (*query_weights(config.get("q_lora_rank")), *REQUIRED)
        return cls(
            family, geometry, ranks, source["rms_norm_eps"], matching_rotation(source, exported), required, exported
        )

    def attention(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """One layer's attention in the target's names."""
        return attention_tensors(
            tensors,
            kv_lora_rank=self.config["kv_lora_rank"],
            qk_rope_head_dim=self.config["qk_rope_head_dim"],
            num_heads=self.geometry.num_heads,
            head_dim=self.geometry.head_dim,
            eps=self.eps,
            biased=self.config["attention_bias"],
            attention_scaling=self.attention_scaling,
        )


def _write_export(plan: _ExportPlan, reader: CheckpointReader, directory: Path, track: Track) -> dict[str, Any]:
    """All weights of a stock checkpoint, layer by layer; returns the record of the export."""
    from care_mla.modeling import LANGUAGE_MODEL, stock_shapes

    prefix, dtype, scale = f"{LANGUAGE_MODEL}.", getattr(torch, plan.config["dtype"]), residual_scale(plan.eps)
    expected = stock_shapes(plan.config)
    writer = ShardedWriter(directory)
    layers = [f"{plan.family.attention_name(layer)}." for layer in range(plan.geometry.num_layers)]
    for attention in track(layers, "Writing layers", len(layers), unit="layers"):
        names = {name for name in reader.names if name.startswith(prefix + attention)}
        names |= {f"{prefix}{attention}{required}" for required in plan.required}
        tensors = plan.attention({name.removeprefix(prefix + attention): reader[name] for name in sorted(names)})
        for name, tensor in tensors.items():
            _require_shape(expected, attention + name, tensor)
            writer.add(attention + name, tensor.to(dtype))
    for name in (name for name in reader.names if not name.startswith(tuple(prefix + layer for layer in layers))):
        own, tensor = name.removeprefix(prefix), reader[name]
        if own == EMBEDDING and f"{prefix}lm_head.weight" not in reader:
            writer.add("lm_head.weight", tensor.clone())
            expected.pop("lm_head.weight")
        if scale != 1.0 and (
            own == EMBEDDING or own.endswith("mlp.down_proj.weight")
        ):  # they write the residual stream
            tensor = (tensor.double() * scale).to(tensor.dtype)
        _require_shape(expected, own, tensor)
        writer.add(own, tensor)
    if expected:
        raise CheckpointError(
            f"{reader.directory} has no {min(expected)}, which the stock class needs ({len(expected)} such)"
        )
    writer.finish()
    width = plan.config["kv_lora_rank"] + plan.config["qk_rope_head_dim"]
    elements, spent = width * len(layers), sum(plan.config["kv_lora_rank"] - rank for rank in plan.ranks)
    notes = [
        f"stock classes have one latent width for all layers: padding to {plan.config['kv_lora_rank']} spends {spent} of {elements} cached "
        "elements per token (convert with --ranks uniform and a width that the engine takes)"
    ]
    return {
        "source": str(reader.directory),
        "architecture": plan.config["architectures"][0],
        "kv_lora_rank": plan.config["kv_lora_rank"],
        "qk_rope_head_dim": plan.config["qk_rope_head_dim"],
        "cache_elements_per_token": elements,
        "kv_save": 1.0 - elements / plan.geometry.cache_elements_per_token,
        "notes": notes if spent else [],
    }


def _require_shape(expected: dict[str, tuple[int, ...]], name: str, tensor: Tensor) -> None:
    """Strike a weight off the list of those that the stock class expects.

    Raises:
        UnsupportedModelError: it has no place there.
    """
    shape = expected.pop(name, None)
    if shape != tuple(tensor.shape):
        place = "no such weight" if shape is None else f"shape {shape}"
        raise UnsupportedModelError(
            f"{name} of shape {tuple(tensor.shape)} does not fit the stock class, which has {place}; serve the converted directory itself"
        )
