"""What the entries of config.json that are read here may hold. What transformers alone reads, it checks itself."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from care_mla.errors import CheckpointError

MOST = {"num_hidden_layers": 1000, "num_labels": 10**6, "num_experts": 10**5, "num_local_experts": 10**5}
"""More than any model has; classes make something of each, so a slip of the pen would fill the memory."""
LARGEST = 2**31 - 1
"""Of a count or a width."""

DTYPES = ("float32", "float64", "bfloat16", "float16")
LAYER_TYPES = ("full_attention", "sliding_attention", "attention")

NEVER_NULL = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
COUNTS = (*NEVER_NULL, "num_key_value_heads", "head_dim", "intermediate_size", "max_position_embeddings")
POSITIVE = (
    "rope_theta",
    "rope_local_base_freq",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "partial_rotary_factor",
    "logits_scaling",
)
"""Entries of which zero or less would be divided by, or make a power of them complex."""
NOT_NEGATIVE = ("rms_norm_eps", "layer_norm_eps", "norm_epsilon")
FINITE = ("attention_multiplier", "residual_multiplier", "embedding_multiplier")
FLAGS = ("use_sliding_window", "tie_word_embeddings")

ROPE_NUMBERS = (
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
)
ROPE_MAY_BE_NULL = ("beta_fast", "beta_slow", "attention_factor", "original_max_position_embeddings")
ROPE_LISTS = ("short_factor", "long_factor")


def found(name: str, value: Any) -> str:
    """An entry as it stands, shortened; NaN and lone surrogates can be printed, too."""
    text = json.dumps(value, default=repr)
    return f"{name} = {text if len(text) <= 80 else text[:77] + '...'}"


def malformed(name: str, value: Any, needed: str) -> CheckpointError:
    """The error of an entry that does not hold what it must."""
    return CheckpointError(f"config.json: {found(name, value)} cannot be read; it must be {needed}")


def check_identity(config: Mapping[str, Any]) -> None:
    """`model_type`, `architectures`, `dtype` and `quantization_config` are what they are in every config.json.

    Raises:
        CheckpointError: the entry, what it holds and what is needed.
    """
    if "model_type" not in config:
        raise CheckpointError(
            "config.json has no model_type, which says of what architecture a model is; "
            "a SOURCE is a directory that transformers' save_pretrained wrote, or a hub id"
        )
    if not isinstance(config["model_type"], str) or not config["model_type"]:
        raise malformed("model_type", config["model_type"], "the name of an architecture")
    architectures = config.get("architectures")
    if architectures is not None and not (isinstance(architectures, list) and all(map(_is_class_name, architectures))):
        raise malformed("architectures", architectures, "a list of class names")
    if not isinstance(config.get("quantization_config", {}), dict | None):
        raise malformed("quantization_config", config["quantization_config"], "an object or null")
    for name in ("dtype", "torch_dtype"):
        if config.get(name) is not None and config[name] not in DTYPES:
            raise malformed(name, config[name], f"one of {', '.join(DTYPES)}, or null")


def check_entries(
    config: Mapping[str, Any],
    *,
    flags: tuple[str, ...] = (),
    counts: tuple[str, ...] = (),
    rope_flags: str | None = None,
) -> None:
    """The entries that all families share, and those that a family names.

    Args:
        config: config.json.
        flags, counts: further entries that are true or false, or positive integers.
        rope_flags: entry with one flag a layer, 0 in those without RoPE.

    Raises:
        CheckpointError: the entry, what it holds and what is needed.
    """
    for name in NEVER_NULL:
        if config.get(name, 1) is None:
            raise malformed(name, None, "a positive integer")
    for name in (*COUNTS, *counts):
        _check(config, name, _is_count, f"a positive integer, at most {LARGEST}")
    for name, most in MOST.items():
        if isinstance(config.get(name), int | float) and config[name] > most:
            raise malformed(name, config[name], f"at most {most}")
    for name in POSITIVE:
        _check(config, name, _is_positive, "a positive number")
    if (config.get("partial_rotary_factor") or 0) > 1:
        raise malformed("partial_rotary_factor", config["partial_rotary_factor"], "a share, more than 0 and at most 1")
    for name in NOT_NEGATIVE:
        _check(config, name, lambda value: _is_number(value) and value >= 0, "a number, not below 0")
    for name in FINITE:
        _check(config, name, _is_number, "a finite number")
    for name in (*FLAGS, *flags):
        _check(config, name, lambda value: isinstance(value, bool), "true or false")
    # Without its flag a window is not looked at, and some published configs write 0 or less for "none" there.
    if config.get("use_sliding_window") is not False:
        _check(config, "sliding_window", _is_count, "a positive number of tokens, or null for none")
    _check_layers(config, rope_flags)
    for name in ("rope_parameters", "rope_scaling"):
        _check_rope(config, name)
    if isinstance(config.get("head_dim"), int) and config["head_dim"] % 2:
        raise malformed("head_dim", config["head_dim"], "even: RoPE turns dimensions in pairs")


def _check(config: Mapping[str, Any], name: str, is_right: Callable[[Any], bool], needed: str) -> None:
    if config.get(name) is not None and not is_right(config[name]):
        raise malformed(name, config[name], needed)


def _check_layers(config: Mapping[str, Any], rope_flags: str | None) -> None:
    layers = config.get("num_hidden_layers")
    types = config.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or not all(isinstance(word, str) for word in types):
            raise malformed("layer_types", types, "a list with a word for every layer, or null")
        unknown = [word for word in types if word not in LAYER_TYPES]
        if unknown:
            raise malformed("layer_types", unknown[0], f"one of {', '.join(LAYER_TYPES)} for every layer")
        _check_length("layer_types", types, layers)
    flags = config.get(rope_flags) if rope_flags is not None else None
    if flags is not None:
        assert rope_flags is not None
        if not isinstance(flags, list) or not all(flag in (0, 1) for flag in flags):
            raise malformed(rope_flags, flags, "a list with 0 or 1 for every layer, or null")
        _check_length(rope_flags, flags, layers)


def _check_length(name: str, values: list[Any], layers: int | None) -> None:
    if layers is not None and len(values) != layers:
        raise CheckpointError(f"config.json: {name} has {len(values)} entries for num_hidden_layers = {layers}")


def _check_rope(config: Mapping[str, Any], name: str) -> None:
    rope = config.get(name)
    if rope is None:
        return
    if not isinstance(rope, dict):
        raise malformed(name, rope, 'an object such as {"rope_type": "default"}, or null')
    by_type = any(isinstance(value, dict) for value in rope.values())
    for where, part in [(f"{name}.{key}", value) for key, value in rope.items()] if by_type else [(name, rope)]:
        if not isinstance(part, dict):
            raise malformed(where, part, "an object, as its neighbours are: RoPE is set by layer type")
        for key in ("rope_type", "type"):
            if key in part and not isinstance(part[key], str):
                raise malformed(f"{where}.{key}", part[key], "the name of a kind of RoPE")
        may_be_null = (*ROPE_MAY_BE_NULL, "factor") if ROPE_LISTS[0] in part else ROPE_MAY_BE_NULL
        for key in ROPE_NUMBERS:
            if key in part and not (part[key] is None and key in may_be_null) and not _is_positive(part[key]):
                raise malformed(f"{where}.{key}", part[key], "a positive number")
        for key in ROPE_LISTS:
            if key in part and not (isinstance(part[key], list) and all(map(_is_positive, part[key]))):
                raise malformed(f"{where}.{key}", part[key], "a list of positive numbers")
        if part.get("partial_rotary_factor", 1) > 1:
            raise malformed(
                f"{where}.partial_rotary_factor", part["partial_rotary_factor"], "a share, more than 0 and at most 1"
            )


def _is_class_name(value: Any) -> bool:
    return isinstance(value, str) and value.isidentifier()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST
