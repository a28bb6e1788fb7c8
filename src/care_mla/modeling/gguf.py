"""A GGUF file once turned into an ordinary Hugging Face directory: every tensor and every entry of it, or a refusal by name.

One file, since all that is known of this format is here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from care_mla.errors import CheckpointError, ConversionError
from care_mla.files import writing
from care_mla.modeling.building import first_line

ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Factors of the RoPE frequencies; transformers drops them, `rope_parameters` keeps what they say."""

LLAMA3_ORIGINAL_LENGTH = 8192
"""Of every Llama 3.x; the file says only what became of the frequencies."""

WITHOUT_EFFECT = ("context_length", "vocab_size", "tensor_data_layout", "pooling_type")
"""Entries of an architecture that do not change what the layers compute, where transformers does not read them."""

NOT_ARGUMENTS = ("model_type", "transformers_version")
"""What `to_dict` of a config writes and its class does not take."""

SPLIT = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")


def require_gguf(file: Path) -> None:
    """
    Raises:
        CheckpointError: no such file, or nothing installed that reads it.
    """
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist")
    try:
        import accelerate  # noqa: F401  (transformers needs both)
        import gguf  # noqa: F401
    except ImportError as error:
        raise CheckpointError(
            "reading a GGUF file needs the packages gguf and accelerate: pip install 'care-mla[gguf]'"
        ) from error


def gguf_to_directory(file: Path, directory: Path) -> None:
    """Dequantize a GGUF model to float32 safetensors with its config and tokenizer, into an existing directory.

    Raises:
        CheckpointError: not a whole GGUF that transformers reads, tensors or entries of it that would be lost, or a directory that
            cannot be written.
    """
    contents = _Contents.read(file)
    contents.require_whole()
    location: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    config: PreTrainedConfig = _named(file, lambda: AutoConfig.from_pretrained(**location))
    config = _named(file, lambda: _completed(config, contents))
    names = _named(file, lambda: _places(config, contents))
    quantized, loading = _named(
        file,
        lambda: AutoModelForCausalLM.from_pretrained(
            **location,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below
        ),
    )
    _require_all_read(loading, names, contents)
    tokenizer = _named(file, lambda: AutoTokenizer.from_pretrained(**location))
    # transformers refuses to save a model that remembers GGUF: rebuild it from a config that does not.
    config = quantized.config
    del config.quantization_config
    if hasattr(config, "rms_norm_eps"):  # GGUF keeps it in float32: 9.999999747e-06 was written as 1e-05
        config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")
    config.name_or_path = file.stem
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantized.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = quantized.generation_config
    with writing(directory):
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


class _Contents:
    """What a GGUF file holds.

    Attributes:
        architecture: as GGUF calls it.
        entries: metadata of the architecture, its name left out of the keys.
        tensors: names.
    """

    def __init__(self, file: Path, reader: Any):
        self.file, self._reader = file, reader
        fields: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        self.kind = fields.get("general.type", "model")
        self.parts = int(fields.get("split.count", 1))
        self.architecture = str(fields.get("general.architecture", ""))
        prefix = f"{self.architecture}."
        self.entries = {name.removeprefix(prefix): v for name, v in fields.items() if name.startswith(prefix)}
        self.tensors = [tensor.name for tensor in reader.tensors]

    @classmethod
    def read(cls, file: Path) -> _Contents:
        """
        Raises:
            CheckpointError: not a GGUF file, or a part of one.
        """
        from gguf import GGUFReader

        with file.open("rb") as opened:
            if opened.read(4) != b"GGUF":
                raise CheckpointError(f"{file} is not a GGUF file: it does not begin with the letters GGUF")
        try:
            return cls(file, GGUFReader(file))
        except Exception as error:  # it reads past the end in many ways
            raise CheckpointError(f"{file} is truncated or damaged ({first_line(error)}); download it again") from error

    def tensor(self, name: str) -> Tensor | None:
        """A tensor that is not quantized, float64; None where the file has none of that name."""
        found = next((tensor for tensor in self._reader.tensors if tensor.name == name), None)
        return None if found is None else torch.tensor(found.data).double().flatten()

    def refuse(self, name: str, why: str) -> CheckpointError:
        """The error of an entry or a tensor that would be lost."""
        value = f" = {self.entries[name]}" if name in self.entries else ""
        name = f"{self.architecture}.{name}" if name in self.entries else name
        return CheckpointError(f"{self.file}: {name}{value} would be lost: {why}; take the model's safetensors instead")

    def require_whole(self) -> None:
        """
        Raises:
            CheckpointError: one part of several, or no model.
        """
        if self.parts > 1 or SPLIT.search(self.file.name):
            raise CheckpointError(
                f"{self.file} is one of {max(self.parts, 2) if self.parts > 1 else 'several'} parts; join them first: llama-gguf-split --merge FIRST_PART WHOLE.gguf"
            )
        if self.kind != "model":
            raise CheckpointError(f"{self.file} holds no model but a {self.kind} (general.type)")
        if not self.architecture:
            raise CheckpointError(f"{self.file} does not say its general.architecture")


def _named(file: Path, read: Callable[[], Any]) -> Any:
    """
    Raises:
        CheckpointError: transformers cannot read the file.
    """
    try:
        return read()
    except (ConversionError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever transformers runs into
        raise CheckpointError(f"{file} cannot be read as a GGUF model: {first_line(error)}") from error


# --- entries ----------------------------------------------------------------------------------------------------------


def _completed(config: PreTrainedConfig, contents: _Contents) -> PreTrainedConfig:
    """The config that transformers reads from a GGUF file, with what it leaves out there.

    Raises:
        CheckpointError: an entry that cannot be expressed.
    """
    known = _mapped_entries(config, contents)
    head_dim = _head_dim(config, contents)
    changes = _rope_changes(config, head_dim, contents)
    if hasattr(config, "head_dim") and config.head_dim != head_dim:
        changes["head_dim"] = head_dim
    for name in sorted(contents.entries):
        if name in known or name in WITHOUT_EFFECT or name.startswith("rope."):
            continue
        changes |= _change(name, contents.entries[name], config, head_dim, contents)
    if not changes:
        return config
    whole = {**config.to_dict(), **changes}
    if "sliding_window" in changes:
        whole.pop("layer_types", None)  # follows from it
    made: PreTrainedConfig = type(config)(**{k: v for k, v in whole.items() if k not in NOT_ARGUMENTS})
    return made


def _mapped_entries(config: PreTrainedConfig, contents: _Contents) -> set[str]:
    """Entries that transformers reads itself."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    kinds = (contents.architecture, config.model_type, config.model_type.removesuffix("_text"))
    mapping: dict[str, str | None] = next(
        (GGUF_CONFIG_MAPPING[kind] for kind in kinds if kind in GGUF_CONFIG_MAPPING), {}
    )
    return {name for name, renamed in mapping.items() if renamed is not None}


_SAME_MEANING = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "logit_scale": "logits_scaling",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "attention.sliding_window": "sliding_window",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "expert_weights_norm": "norm_topk_prob",
}
"""Entry of a GGUF file that transformers does not read -> entry of a config that means the same."""


def _change(name: str, value: Any, config: PreTrainedConfig, head_dim: int, contents: _Contents) -> dict[str, Any]:
    """What an entry that transformers does not read changes in the config; nothing where it says what is so anyway."""
    if name in ("attention.key_length", "attention.value_length"):
        fits = hasattr(config, "head_dim") or value == config.hidden_size // config.num_attention_heads
        if value == head_dim and fits:
            return {}
        raise contents.refuse(name, f"keys and values of {config.model_type} are as wide as its heads")
    if name == "attention.scale" and math.isclose(value, head_dim**-0.5, rel_tol=1e-4):
        return {}
    if (name == "attention.causal" and value) or (name == "use_parallel_residual" and not value):
        return {}
    if name == "attention.sliding_window_pattern" and isinstance(value, list):
        windowed = [kind == "sliding_attention" for kind in getattr(config, "layer_types", None) or []]
        if windowed == [bool(one) for one in value]:
            return {}
    elif name in _SAME_MEANING and hasattr(config, _SAME_MEANING[name]):
        entry = _SAME_MEANING[name]
        value = (value or None) if entry == "sliding_window" else value
        if getattr(config, entry) == value:
            return {}
        if entry != "sliding_window" or not hasattr(config, "use_sliding_window"):
            return {entry: value}
    elif not value:  # zero, false, none
        return {}
    raise contents.refuse(
        name, f"transformers' {config.model_type} does not read it from GGUF, and it may change the model"
    )


def _head_dim(config: PreTrainedConfig, contents: _Contents) -> int:
    """Width of a head as llama.cpp takes it; transformers takes what RoPE turns for it."""
    return int(contents.entries.get("attention.key_length") or config.hidden_size // config.num_attention_heads)


def _rope_changes(config: PreTrainedConfig, head_dim: int, contents: _Contents) -> dict[str, Any]:
    """`rope_parameters` as the file's metadata and tensors have them.

    Raises:
        CheckpointError: a scaling that has no counterpart in transformers, by name.
    """
    rope = {name.removeprefix("rope."): v for name, v in contents.entries.items() if name.startswith("rope.")}
    present = [name for name in ROPE_TENSORS if name in contents.tensors]
    width = int(rope.pop("dimension_count", head_dim))
    share = {} if width == head_dim else {"partial_rotary_factor": width / head_dim}
    if share and int(head_dim * share["partial_rotary_factor"]) != width:
        raise contents.refuse("rope.dimension_count", f"it is no share of the {head_dim} dimensions of a head")
    partial = hasattr(config, "partial_rotary_factor") or "partial_rotary_factor" in (config.rope_parameters or {})
    if share and not partial:
        raise contents.refuse(
            "rope.dimension_count", f"RoPE of {config.model_type} turns all {head_dim} dimensions of a head"
        )
    base = float(rope.pop("freq_base", 10000.0))
    scaling = {name.removeprefix("scaling."): rope.pop(name) for name in list(rope) if name.startswith("scaling.")}
    scaling.pop("finetuned", None)
    if "scale_linear" in rope:
        scaling |= {"type": "linear", "factor": rope.pop("scale_linear")}
    if rope:
        raise contents.refuse(f"rope.{min(rope)}", "what it does to RoPE is not known here")
    named = str(scaling.pop("type", "none"))
    parameters = (
        _tensor_scaling(contents, scaling, base, width) if present else _named_scaling(named, scaling, contents)
    )
    nested = any(isinstance(value, dict) for value in (getattr(config, "rope_parameters", None) or {}).values())
    if nested and not parameters and not share:
        return {}
    if nested:
        raise contents.refuse(
            present[0] if present else "rope.scaling.type", "RoPE differs by layer type in this architecture"
        )
    wanted = {"rope_type": "default", **parameters, "rope_theta": base, **share}
    return {} if wanted == config.rope_parameters else {"rope_parameters": wanted}


def _named_scaling(kind: str, scaling: dict[str, Any], contents: _Contents) -> dict[str, Any]:
    """`rope_parameters` of what the metadata calls linear or yarn; empty for none."""
    factor, attention = float(scaling.pop("factor", 1.0) or 1.0), float(scaling.pop("attn_factor", 1.0))
    original = scaling.pop("original_context_length", None)
    parameters: dict[str, Any] = {}
    if kind == "linear" and factor != 1.0:
        parameters = {"rope_type": "linear", "factor": factor}
    elif kind == "yarn" and factor != 1.0:
        parameters = {"rope_type": "yarn", "factor": factor}
        parameters |= {} if original is None else {"original_max_position_embeddings": int(original)}
        for ours, theirs in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
            parameters |= {ours: float(scaling.pop(theirs))} if theirs in scaling else {}
    elif kind not in ("none", "linear", "yarn"):
        raise contents.refuse("rope.scaling.type", "linear and yarn are known here, and longrope with its tensors")
    if attention != 1.0:
        raise contents.refuse("rope.scaling.attn_factor", "transformers computes it from the factor")
    if scaling:
        raise contents.refuse(f"rope.scaling.{min(scaling)}", "what it does to RoPE is not known here")
    return parameters


def _tensor_scaling(contents: _Contents, scaling: dict[str, Any], base: float, width: int) -> dict[str, Any]:
    """`rope_parameters` of frequencies whose factors are tensors: llama3 or longrope."""
    divisors, long, short = (contents.tensor(name) for name in ROPE_TENSORS)
    original, attention = scaling.pop("original_context_length", None), scaling.pop("attn_factor", None)
    if scaling.pop("factor", 1.0) not in (0.0, 1.0) or scaling:
        raise contents.refuse(
            "rope_freqs.weight" if divisors is not None else ROPE_TENSORS[1], "rope.scaling stands beside it"
        )
    if divisors is None:
        if long is None or short is None or original is None:
            raise contents.refuse(ROPE_TENSORS[1] if short is None else ROPE_TENSORS[2], "its counterpart is missing")
        parameters = {
            "rope_type": "longrope",
            "long_factor": _rounded(long),
            "short_factor": _rounded(short),
            "original_max_position_embeddings": int(original),
        }
        return parameters if attention is None else {**parameters, "attention_factor": float(attention)}
    if long is not None or short is not None:
        raise contents.refuse("rope_freqs.weight", "factors of longrope stand beside it")
    if torch.all(divisors == 1.0):
        return {}
    llama3 = {
        "rope_type": "llama3",
        "factor": float(f"{float(divisors.max()):.6g}"),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": int(original or LLAMA3_ORIGINAL_LENGTH),
    }
    expected = llama3_divisors(base, width, llama3)
    if len(expected) != len(divisors) or not torch.allclose(expected, divisors, rtol=1e-4, atol=0.0):
        raise contents.refuse("rope_freqs.weight", "its factors are not those of Llama 3")
    return llama3


def llama3_divisors(base: float, width: int, parameters: dict[str, Any]) -> Tensor:
    """What Llama 3 divides each frequency by, [width / 2] float64: 1 for fast ones, the factor for slow ones, smooth between."""
    frequencies = base ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    turns = parameters["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / parameters["factor"] + smooth)


def _rounded(factors: Tensor) -> list[float]:
    """Factors as they were written before GGUF kept them in float32."""
    return [float(f"{value:.7g}") for value in factors.tolist()]


# --- tensors ----------------------------------------------------------------------------------------------------------


def _places(config: PreTrainedConfig, contents: _Contents) -> dict[str, str]:
    """Tensor of a GGUF file -> weight of the model, for all that the model has.

    Raises:
        CheckpointError: a tensor of the file that has no place.
    """
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    processor = TENSOR_PROCESSORS.get(contents.architecture, TensorProcessor)(config=config.to_dict())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names: dict[str, str] = get_gguf_hf_weights_map(model, processor)
    for name in contents.tensors:
        if name not in ROPE_TENSORS and not {name, name.removesuffix(".weight")} & names.keys():
            raise contents.refuse(name, f"transformers' {config.model_type} has no place for this tensor")
    return names


def _require_all_read(loading: dict[str, Any], names: dict[str, str], contents: _Contents) -> None:
    """Every weight of the model is from the file.

    Args:
        loading: what transformers says of it.
        names: of `_places`.

    Raises:
        CheckpointError: one that is not, by name.
    """
    lost = sorted({*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])})
    if lost:
        stored = next((gguf for gguf, ours in names.items() if ours == lost[0]), lost[0])
        raise CheckpointError(
            f"{contents.file} has no {stored} of the right shape ({len(lost)} such), so the model would have random weights there"
        )
    weights = list(names.values())
    for stored, ours in names.items():  # experts' gate and up projections make one weight; half of it would be zeros
        if weights.count(ours) > 1 and not {stored, f"{stored}.weight"} & set(contents.tensors):
            raise CheckpointError(f"{contents.file} has no {stored}, so the model would have zeros there")
