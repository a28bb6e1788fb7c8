"""What is known of a source is compared with transformers' own modules before anything is spent on it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from care_mla.checkpoint import CheckpointReader
from care_mla.conversion.source import PROJECTIONS, Source
from care_mla.errors import CheckpointError, UnsupportedModelError
from care_mla.layouts import JOINT, LatentContent
from care_mla.linalg import Factors

TOLERANCE = 1e-3
"""Largest relative difference in float32 between the source's attention and a converted one that lost nothing."""


@dataclass(frozen=True)
class _InMemory:
    """Weights that stand in for a checkpoint's."""

    tensors: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def get(self, name: str) -> Tensor | None:
        return self.tensors.get(name)


def require_true_spec(source: Source) -> None:
    """Refuse a family spec that describes another attention than the one in transformers.

    One attention of each kind is converted at full rank, with random weights that the spec finds, and run beside transformers'
    own; costs one layer's memory and no reading.

    Raises:
        UnsupportedModelError
    """
    from care_mla.modeling import attention_trials, source_text_config

    family = source.family
    for trial in attention_trials(source.directory, source_text_config(source.reader.config), family):
        prefix = f"{family.attention_name(trial.layer)}."
        stand_in = _InMemory({prefix + name: tensor for name, tensor in trial.weights.items()})
        known = replace(source, reader=cast(CheckpointReader, stand_in))
        try:
            converted = full_rank_tensors(known, trial.layer)
        except (KeyError, CheckpointError) as error:
            raise UnsupportedModelError(
                f"layer {trial.layer}: the family spec of {family.model_type} does not find the projections and norms of the attention in transformers: {error}"
            ) from error
        difference = trial.difference(converted)
        if not difference <= TOLERANCE:
            raise UnsupportedModelError(
                f"layer {trial.layer}: with the family spec of {family.model_type} the attention's output differs by {difference:.1%} from transformers' "
                "own at full rank; the spec describes another attention (names and order of q, k, v, norms before or after RoPE, biases, scale)"
            )


def full_rank_tensors(source: Source, layer: int) -> dict[str, Tensor]:
    """An attention of layout joint that loses nothing, by name inside the attention: the latent is keys and values as they are."""
    weights = source.attention(layer)
    whole = torch.eye(len(weights.keys_and_values), dtype=weights.k.dtype)
    return JOINT.tensors(weights, [Factors(encode=whole, up=whole)], LatentContent(), None, source.geometry)


def require_same_weights(source: Source, model: Any) -> None:
    """Refuse a loaded model that is not what will be converted: every projection is compared, every weight must be finite.

    Args:
        model: the source as transformers loaded it.

    Raises:
        CheckpointError: names the tensor.
    """
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise CheckpointError(
                f"{source.name}: {name} holds NaN or infinite numbers as {str(parameter.dtype).removeprefix('torch.')}; the checkpoint is damaged, or its "
                "numbers do not fit that type"
            )
    for layer in range(source.geometry.num_layers):
        attention = model.get_submodule(source.family.attention_name(layer))
        for projection in PROJECTIONS:
            module, rows = source.family.stored(projection, source.geometry)
            loaded = attention.get_submodule(module)
            for kind, stored in zip(("weight", "bias"), source.projection(layer, projection), strict=True):
                own = getattr(loaded, kind, None)
                if own is None and stored is None:
                    continue
                same = (
                    own is not None and stored is not None and torch.equal(own[rows], stored.to(own.device, own.dtype))
                )
                if not same:
                    raise CheckpointError(
                        f"{source.name}: {source.family.attention_name(layer)}.{module}.{kind} as transformers loaded it is not what is stored for "
                        f"{projection}; the checkpoint is read in two ways, save it anew with save_pretrained"
                    )


def require_runs(source: Source, model: Any) -> None:
    """Refuse a loaded model that transformers cannot run in its precision on its device, before it is given a text.

    Raises:
        CheckpointError
    """
    parameter = next(model.parameters())
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=parameter.device), use_cache=False)
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{source.name} is loaded but does not run in {str(parameter.dtype).removeprefix('torch.')} on {parameter.device}: {reason}; change "
            "dtype in config.json, or calibrate with another --dtype or --device"
        ) from error
