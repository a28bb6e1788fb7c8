"""What transformers' stock classes expect of an exported checkpoint."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from care_mla.errors import UnsupportedModelError
from care_mla.modeling.building import complete, rotary_module, skeleton


def complete_config(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with what it omits and the family's class fills in; RoPE under `rope_parameters`, however it was written.

    Raises:
        CheckpointError, UnsupportedModelError: transformers makes no config of it.
    """
    whole: dict[str, Any] = complete(config).to_dict()
    return whole


def stock_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight that the class of a config.json expects; nothing is allocated.

    Raises:
        CheckpointError, UnsupportedModelError: transformers builds no model of it.
    """
    return {name: tuple(tensor.shape) for name, tensor in skeleton(config).state_dict().items()}


def matching_rotation(source: dict[str, Any], exported: dict[str, Any]) -> float:
    """Check that an exported model turns its rotary key as the source does; returns the factor of cos and sin (YaRN).

    Args:
        source, exported: the two config.json.

    Raises:
        UnsupportedModelError: other frequencies, or a scaling of scores that the source has not.
    """
    theirs, ours = rotary_module(exported, "model.rotary_emb"), rotary_module(source)
    their_frequencies, our_frequencies = cast(Tensor, theirs.inv_freq), cast(Tensor, ours.inv_freq)
    step = len(our_frequencies) // len(their_frequencies)
    parameters = exported["rope_parameters"]
    same = torch.allclose(their_frequencies, our_frequencies[::step], rtol=1e-5, atol=0.0)
    if not same or theirs.attention_scaling != ours.attention_scaling or parameters.get("mscale_all_dim"):
        raise UnsupportedModelError(
            f"rope_type {parameters['rope_type']!r} with a rotary key of {2 * len(their_frequencies)}: the stock class generates other "
            f"frequencies or scales than the source; convert with --qk-rope-head-dim {2 * len(our_frequencies)}, or serve the converted "
            "directory itself"
        )
    return float(cast(float, ours.attention_scaling))
