"""What a directory holds beside plain weights: signs of quantization and adapters, which no conversion may overlook."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from care_mla.errors import CheckpointError, UnsupportedModelError

FLOATING = ("F64", "F32", "BF16", "F16")
"""Types of plain weights, as safetensors names them."""
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json", "quantization_config.json")
QUANTIZATION_ENTRIES = ("quantization_config", "compression_config")

_QUANTIZATION_NAMES = re.compile(
    r"(^|[._])(scales?|scale_inv|scale_\d+|zero_?points?|zeros|qweight|qzeros|qdata|g_idx|absmax|quant_map|quant_state|scb|amax|packed|codebooks?|codes)$"
    r"|_blocks$|bitsandbytes|weight_(shape|format)$",
    re.IGNORECASE,
)
_CURE = "low-rank maps need the weights themselves; load it dequantized, in bfloat16, and convert what save_pretrained writes"


def require_no_adapter(directory: Path) -> None:
    """Refuse an adapter (LoRA and its kin): it is not in the weights, and only some programs would apply it.

    Raises:
        CheckpointError
    """
    found = next((name for name in ADAPTER_FILES if (directory / name).is_file()), None)
    if found is not None:
        raise CheckpointError(
            f"{directory} holds an adapter ({found}), which is not part of the weights beside it; merge it first: load the model with peft, "
            "call merge_and_unload, and convert what save_pretrained writes; or remove the adapter's files to convert the model without it"
        )


def require_unquantized(directory: Path, config: Mapping[str, Any]) -> None:
    """Refuse a model whose files or config.json say that its weights are quantized.

    Raises:
        UnsupportedModelError
    """
    found = next((name for name in QUANTIZATION_FILES if (directory / name).is_file()), None)
    if found is not None:
        raise UnsupportedModelError(
            f"{directory / found} says that the weights are quantized, and {_CURE}; if it is a stray file, remove it"
        )
    entry = next(_entries(config), None)
    if entry is not None:
        raise UnsupportedModelError(f"config.json says in {entry} that the weights are quantized, and {_CURE}")


def _entries(config: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """Dotted names of the entries that tell of quantization, at any depth."""
    for key, value in config.items():
        if key in QUANTIZATION_ENTRIES and value is not None:
            yield above + key
        elif isinstance(value, Mapping):
            yield from _entries(value, f"{above}{key}.")


def require_plain_tensor(directory: Path, name: str, dtype: str, *, loaded: bool) -> None:
    """Refuse one stored tensor that is, or belongs to, something other than a plain floating-point weight.

    Args:
        dtype: as safetensors names it.
        loaded: whether transformers loads it as a weight; what it leaves alone is judged by its name as well.

    Raises:
        UnsupportedModelError
    """
    if loaded and dtype not in FLOATING:
        raise UnsupportedModelError(
            f"{directory}: {name} is stored as {dtype}, not as float32, bfloat16 or float16 numbers; if the weights are quantized: {_CURE}"
        )
    packed = dtype.startswith(("F8", "F6", "F4")) or dtype in ("I8", "U8")
    if not loaded and (packed or _QUANTIZATION_NAMES.search(name)):
        raise UnsupportedModelError(
            f"{directory}: {name} ({dtype}) is no weight of this architecture but tells how quantized ones are stored, and {_CURE}"
        )
