"""What transformers would load of a checkpoint, by transformers' own classes and renamings; no weight is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from care_mla.errors import CheckpointError

_OLD_BUFFERS = re.compile(r"(^|\.)rotary_emb\.|(^|\.)position_ids$")
"""What older versions stored beside weights; transformers leaves them alone without a word."""


@dataclass(frozen=True)
class Inventory:
    """A checkpoint as transformers reads it.

    Attributes:
        names: name, as the model's class spells its prefix -> name as stored, of all tensors that are loaded.
        converted: those of them that do not become a weight as they are (experts that are stored one by one).
        ignored: stored tensors that are not loaded -> whether transformers expects such leftovers.
        missing: weights of the model that the checkpoint has not.
        mismatched: name -> (shape of the model, name as stored), where the stored one has another.
        shareable: weights that a model of this class may share with another, if its config.json says so.
        dtype: that the model is loaded in when none is asked for; None: as its first tensor is stored.
    """

    names: Mapping[str, str]
    converted: frozenset[str]
    ignored: Mapping[str, bool]
    missing: tuple[str, ...]
    mismatched: Mapping[str, tuple[tuple[int, ...], str]]
    shareable: frozenset[str]
    dtype: torch.dtype | None


def own_config(directory: Path) -> Any:
    """The configuration as `from_pretrained` reads it.

    Raises:
        CheckpointError: transformers does not read it.
    """
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # a config class checks what it likes, and raises what it likes
        raise CheckpointError(
            f"{directory}/config.json cannot be read by transformers: {_first_line(error)}"
        ) from error


def empty_model(directory: Path, config: Any, **options: Any) -> PreTrainedModel:
    """The model of a configuration on the meta device: modules and shapes, no memory.

    Raises:
        CheckpointError: transformers does not build it.
    """
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **options)
    except Exception as error:  # as above
        raise CheckpointError(
            f"{directory}/config.json describes no model that transformers builds: {_first_line(error)}"
        ) from error
    return model


class _Loading:
    """Which weight a stored name stands for, as transformers renames while it loads."""

    def __init__(self, model: PreTrainedModel):
        transforms = get_model_conversion_mapping(model)
        self.renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        self.converters = [each for each in transforms if isinstance(each, WeightConverter)]
        self.prefix = model.base_model_prefix
        self.shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}

    def weight(self, stored: str) -> tuple[str, list[str]]:
        """A weight of the model, if it has one of that name, and what else the stored tensor becomes where it is converted."""
        name, pattern = rename_source_key(stored, self.renamings, self.converters, self.prefix, self.shapes)
        if name not in self.shapes and stored in self.shapes:
            name, pattern = rename_source_key(stored, [], [], self.prefix, self.shapes)
        if pattern is None:
            return name, []
        targets = next(c.target_patterns for c in self.converters if pattern in c.source_patterns)
        return name, [name.replace(targets[0], target) for target in targets]

    def spelled(self, stored: str, weight: str) -> str:
        """The stored name with the prefix that the model's class has, and transformers adds or takes away where it must."""
        prefix = f"{self.prefix}."
        candidates = (
            stored.removeprefix(prefix),
            stored,
            prefix + stored,
        )  # a prefix that is there twice is taken away
        fitting = (c for c in candidates if c.startswith(prefix) == weight.startswith(prefix))
        return next((c for c in fitting if self.weight(c)[0] == weight), stored)


def take_inventory(directory: Path, stored: Mapping[str, tuple[int, ...]]) -> Inventory:
    """Sort the tensors of a checkpoint as `from_pretrained` would.

    Args:
        directory: of config.json.
        stored: shapes by stored name.

    Raises:
        CheckpointError: transformers does not read config.json, or two tensors stand for one weight.
    """
    config = own_config(directory)
    model = empty_model(directory, config)
    loading = _Loading(model)
    names: dict[str, str] = {}
    whole: dict[str, str] = {}
    converted, found = set(), set()
    ignored: dict[str, bool] = {}
    mismatched: dict[str, tuple[tuple[int, ...], str]] = {}
    for name in sorted(stored):
        weight, parts = loading.weight(name)
        if weight not in loading.shapes:
            ignored[name] = _is_old_buffer(model, name)
            continue
        spelled = loading.spelled(name, weight)
        if twin := names.get(spelled) or whole.get(weight):
            raise CheckpointError(
                f"{directory}: {twin} and {name} are both stored and stand for one weight, {weight}; remove one of them"
            )
        names[spelled] = name
        found |= {weight, *parts}
        if parts:
            converted.add(spelled)
            continue
        whole[weight] = name
        if stored[name] != loading.shapes[weight]:
            mismatched[weight] = (loading.shapes[weight], name)
    missing = tuple(sorted(set(loading.shapes) - found - _excused(model, found)))
    shareable = frozenset(model._tied_weights_keys or ())
    dtype = getattr(config, "dtype", None)
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    return Inventory(names, frozenset(converted), ignored, missing, mismatched, shareable, dtype)


def _is_old_buffer(model: PreTrainedModel, name: str) -> bool:
    patterns = model._keys_to_ignore_on_load_unexpected or ()
    return bool(_OLD_BUFFERS.search(name)) or any(re.search(pattern, name) for pattern in patterns)


def _excused(model: PreTrainedModel, found: set[str]) -> set[str]:
    """Weights that may be missing: shared with one that is there, or such as transformers makes itself."""
    tied = {frozenset(pair) for pair in model.get_expanded_tied_weights_keys(all_submodels=True).items()}
    patterns = model._keys_to_ignore_on_load_missing or ()
    made = {name for name, _ in model.named_parameters() if any(re.search(pattern, name) for pattern in patterns)}
    return made.union(*(pair for pair in tied if pair & found))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{lines[0]} ({type(error).__name__})" if lines else type(error).__name__
