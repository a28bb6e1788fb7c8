"""From a config.json to transformers' own config and model, without weights; what transformers cannot build is named by its entry."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from care_mla.errors import CheckpointError, ConversionError, UnsupportedModelError
from care_mla.families import FamilySpec, get_family
from care_mla.families.entries import check_identity, found, malformed

NEEDED = ("model_type",)
"""Entries that are not left out to find which of them stands in the way."""


def complete(config: dict[str, Any]) -> PreTrainedConfig:
    """The config that transformers makes of a config.json.

    Raises:
        CheckpointError: entries that its class refuses, by name.
        UnsupportedModelError: this transformers has no such model type.
    """
    check_identity(config)
    kind = config["model_type"]
    if kind not in CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} has no model_type {kind!r}; a newer one may"
        )
    made: PreTrainedConfig = _named(config, lambda entries: AutoConfig.for_model(**entries))
    return made


def skeleton(config: dict[str, Any]) -> PreTrainedModel:
    """The causal model of a config.json on the meta device: shapes and modules, no memory.

    Raises:
        CheckpointError, UnsupportedModelError: as `complete`.
    """
    complete(config)
    model: PreTrainedModel = _named(config, _on_meta)
    return model


def rotary_module(config: dict[str, Any], path: str | None = None) -> nn.Module:
    """The rotary embedding that a model of this config.json has, without its weights.

    Args:
        path: of the module; None asks the family.

    Raises:
        CheckpointError, UnsupportedModelError: as `complete`.
    """
    return _rotary(skeleton(config), complete(config), path or get_family(config).rotary)


def require_buildable(config: dict[str, Any]) -> None:
    """Refuse a config.json of which transformers makes no model, or one whose attention cannot run or is not what was read.

    Takes a tenth of a second: nothing is allocated.

    Args:
        config: of a source, which has a family.

    Raises:
        CheckpointError: the entries that stand in the way.
        UnsupportedModelError: this transformers has no such model type.
    """
    family = get_family(config)
    read = family.geometry(config)
    _require_rope_kind(config)
    loaded = family.geometry(complete(config).to_dict())
    if differing := [name for name, value in read.to_dict().items() if loaded.to_dict()[name] != value]:
        raise CheckpointError(
            f"config.json: {differing[0]} reads as {read.to_dict()[differing[0]]}, and transformers builds {loaded.to_dict()[differing[0]]}; "
            "write head counts, hidden_size and head_dim out"
        )
    _named(config, lambda entries: _run_attention(entries, family))


def _on_meta(config: dict[str, Any]) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    return model


def _rotary(model: PreTrainedModel, config: PreTrainedConfig, path: str) -> nn.Module:
    return cast(nn.Module, type(model.get_submodule(path))(config=config))


def _run_attention(config: dict[str, Any], family: FamilySpec) -> None:
    """Two positions through the rotary module, near and far, and, on meta, the first and last attention."""
    model, made = _on_meta(config), AutoConfig.for_model(**config)
    try:
        rotary = _rotary(model, made, family.rotary)
        layers = cast(nn.ModuleList, model.get_submodule(family.layers))
    except AttributeError as error:
        raise UnsupportedModelError(
            f"the family spec of {family.model_type} names modules that transformers' model has not: {error}"
        ) from error
    hidden = torch.zeros(1, 2, made.hidden_size, dtype=model.dtype, device="meta")
    for index, far in ((0, 1), (len(layers) - 1, made.max_position_embeddings)):  # longrope has other factors there
        more = (made.layer_types[index],) if family.rope_by_layer_type else ()
        rotation = rotary(torch.zeros(1, 2, 1, dtype=model.dtype), torch.tensor([[0, far]]), *more)
        rotation = tuple(part.to("meta") for part in rotation)
        getattr(layers[index], family.attention)(hidden, position_embeddings=rotation, attention_mask=None)


def _require_rope_kind(config: dict[str, Any]) -> None:
    """
    Raises:
        CheckpointError: a kind of RoPE that transformers does not know.
    """
    for name in ("rope_parameters", "rope_scaling"):
        rope = config.get(name) or {}
        nested = {f"{name}.{key}": value for key, value in rope.items() if isinstance(value, dict)}
        for where, part in (nested or {name: rope}).items():
            kind = part.get("rope_type", part.get("type", "default"))
            if kind not in (known := {"default", "su", *ROPE_INIT_FUNCTIONS}):
                raise malformed(f"{where}.rope_type", kind, f"one of {', '.join(sorted(known - {'su'}))}")


def _named(config: dict[str, Any], build: Callable[[dict[str, Any]], Any]) -> Any:
    """What `build` makes of a config.json.

    Raises:
        CheckpointError: it fails; the entries without which it would not.
    """
    try:
        return build(deepcopy(config))  # classes write into the objects inside
    except ConversionError:
        raise
    except (
        Exception
    ) as error:  # a config class raises whatever its entries lead it to: any of it means that they are wrong
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise CheckpointError(_why(config, build, error)) from error


def _why(config: dict[str, Any], build: Callable[[dict[str, Any]], Any], error: Exception) -> str:
    reason = f"{type(error).__name__}: {_says(error)}"
    small = _of_one_layer(config)  # many layers take long to build, and fail as one does
    searched = config if _builds(small, "", build) else small
    entries = [found(name, config[name]) for name in config if name not in NEEDED and _builds(searched, name, build)]
    given = f"with {' or '.join(entries[:3])}, " if entries else ""
    return (
        f"config.json: {given}transformers {transformers.__version__} builds no {config['model_type']} model ({reason})"
    )


def _of_one_layer(config: dict[str, Any]) -> dict[str, Any]:
    layers = config.get("num_hidden_layers")
    cut = {name: value[:1] for name, value in config.items() if isinstance(value, list) and len(value) == layers}
    return {**config, **cut, **({} if layers is None else {"num_hidden_layers": 1})}


def _builds(config: dict[str, Any], without: str, build: Callable[[dict[str, Any]], Any]) -> bool:
    try:
        build({name: deepcopy(value) for name, value in config.items() if name != without})
    except Exception:  # as above
        return False
    return True


def first_line(error: BaseException) -> str:
    """What an error of a library says first, in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _says(error: Exception) -> str:
    """What an error says, in one line: strict configs name the field below a heading, which ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no reason given"]
    said = lines[1] if lines[0].endswith(":") and len(lines) > 1 else lines[0]
    said = said.removeprefix("TypeError: ").removeprefix("ValueError: ").partition(". Errors: ")[0]
    return said if len(said) <= 240 else f"{said[:237]}..."
