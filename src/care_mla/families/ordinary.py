"""Which config.json need not be built to know that they can be: `care inspect` answers of them without torch.

transformers checks a config.json by building it, which takes seconds. Most hold the same few entries, and of these it is known
what a class makes of them. Anything else, an entry that is not listed or a value that is not plain, is left to transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from care_mla.families.spec import FamilySpec

_Check = Callable[[Any, Mapping[str, Any]], bool]


def _count(value: Any, config: Mapping[str, Any]) -> bool:
    return type(value) is int and 0 < value < 2**31


def _flag(value: Any, config: Mapping[str, Any]) -> bool:
    return type(value) is bool


def _share(value: Any, config: Mapping[str, Any]) -> bool:
    return type(value) is float and 0.0 <= value < 1.0


def _positive(value: Any, config: Mapping[str, Any]) -> bool:
    return type(value) is float and 0.0 < value < math.inf


def _theta(value: Any, config: Mapping[str, Any]) -> bool:
    return type(value) in (int, float) and 1.0 < value < 1e12


def _token(value: Any, config: Mapping[str, Any]) -> bool:
    size = config.get("vocab_size")
    return value is None or (type(value) is int and type(size) is int and 0 <= value < size)


def _tokens(value: Any, config: Mapping[str, Any]) -> bool:
    return all(_token(one, config) for one in value) if isinstance(value, list) and value else _token(value, config)


def _word(value: Any, config: Mapping[str, Any]) -> bool:
    return isinstance(value, str)


def _activation(value: Any, config: Mapping[str, Any]) -> bool:
    return value in ("silu", "gelu", "gelu_pytorch_tanh", "relu")


def _no_window(value: Any, config: Mapping[str, Any]) -> bool:
    """None; or a width with a flag that says that it is not used, as Qwen2 and Qwen3 are published."""
    return value is None or (_count(value, config) and config.get("use_sliding_window") is False)


def _rope(value: Any, config: Mapping[str, Any]) -> bool:
    """None, or one of the kinds without tables, whole and consistent."""
    if value is None:
        return True
    if not isinstance(value, dict):
        return False
    entries = dict(value)
    kind = entries.pop("rope_type", None)
    if "rope_theta" in entries and not _theta(entries.pop("rope_theta"), config):
        return False
    if kind == "default":
        return not entries
    if not all(type(entry) in (int, float) and 0 < entry < 2**31 for entry in entries.values()):
        return False
    if kind == "linear":
        return entries.keys() == {"factor"} and type(entries["factor"]) is float and entries["factor"] >= 1.0
    if kind != "llama3":
        return False
    names = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    return (
        entries.keys() == names
        and all(type(entries[name]) is float for name in ("factor", "low_freq_factor", "high_freq_factor"))
        and entries["factor"] >= 1.0
        and entries["low_freq_factor"] < entries["high_freq_factor"]
        and _count(entries["original_max_position_embeddings"], config)
        and entries["original_max_position_embeddings"] < config["max_position_embeddings"]
    )


NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
"""Entries that must be there: the classes' own values for them differ."""

PLAIN: dict[str, _Check] = {
    **dict.fromkeys((*NEEDED, "head_dim"), _count),
    **dict.fromkeys(
        ("attention_bias", "mlp_bias", "use_cache", "tie_word_embeddings", "use_sliding_window"),
        _flag,
    ),
    **dict.fromkeys(("attention_dropout", "initializer_range"), _share),
    **dict.fromkeys(("bos_token_id", "pad_token_id", "unk_token_id"), _token),
    "eos_token_id": _tokens,
    "rms_norm_eps": _positive,
    "rope_theta": _theta,
    **dict.fromkeys(("rope_parameters", "rope_scaling"), _rope),
    "hidden_act": _activation,
    "sliding_window": _no_window,
    "pretraining_tp": lambda value, config: value == 1 and type(value) is int,
    "use_mrope": lambda value, config: value is False,
    "max_window_layers": _count,
    **dict.fromkeys(("model_type", "transformers_version", "_name_or_path", "_model_name_or_path"), _word),
    **dict.fromkeys(
        ("architectures", "dtype", "torch_dtype"), lambda value, config: True
    ),  # `check_identity` has read them
}
"""Entries of which all is known, each with what it must hold."""


def is_ordinary(config: Mapping[str, Any], family: FamilySpec) -> bool:
    """Whether a config.json that `family` has read is one of which transformers surely makes the model that was read.

    Args:
        config: config.json's entries, checked by `FamilySpec.check_config`.
    """
    if any(name not in config for name in NEEDED) or not all(
        name in PLAIN and PLAIN[name](value, config) for name, value in config.items()
    ):
        return False
    if config.get("rope_scaling") is not None and config.get("rope_parameters") is not None:
        return False
    heads, width = (
        config["num_attention_heads"],
        config["hidden_size"],
    )  # some classes want whole heads, head_dim or not
    plain_family = not (family.rope_layers or family.rope_by_layer_type or family.full_attention_every or family.sinks)
    return width % heads == 0 and plain_family
