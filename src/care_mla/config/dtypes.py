"""What dtypes are called, where torch is not needed to know it."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from care_mla.errors import ConfigError

DTYPES = ("float32", "bfloat16", "float16")
_WORDS = {
    **dict.fromkeys(("float32", "fp32", "f32", "float", "single"), "float32"),
    **dict.fromkeys(("bfloat16", "bf16"), "bfloat16"),
    **dict.fromkeys(("float16", "fp16", "f16", "half"), "float16"),
}


def named_dtype(dtype: Any, *, option: str = "--dtype") -> str:
    """What a dtype of weights is called -> one of `DTYPES`, or "auto": as they are stored.

    Args:
        dtype: "float32", "bfloat16", "float16", their short names (fp32, bf16, fp16, half, ...), with or without "torch.", in
            any case; a torch.dtype; None is "auto".
        option: how the message calls it.

    Raises:
        ConfigError: another word, or a dtype that models are not run in.
    """
    word = _word(dtype)
    if word == "auto":
        return "auto"
    if word not in _WORDS:
        raise ConfigError(
            f"{option} {_shown(dtype)}: {_why_not(word)}; choose {', '.join(DTYPES)}, or auto (as stored)"
        )
    return _WORDS[word]


def named_precision(precision: Any) -> str:
    """What --precision of a training run is called -> "auto", "float32" or "bfloat16".

    Raises:
        ConfigError: another word; float16 too, whose gradients would need scaling.
    """
    word = _word(precision)
    found = "auto" if word == "auto" else _WORDS.get(word)
    if found not in ("auto", "float32", "bfloat16"):
        raise ConfigError(
            f"--precision {_shown(precision)}: training runs in float32 or bfloat16 (auto: bfloat16 where the device has it)"
        )
    return found


DType = Annotated[Literal["auto", "float32", "bfloat16", "float16"], BeforeValidator(named_dtype)]
Precision = Annotated[Literal["auto", "float32", "bfloat16"], BeforeValidator(named_precision)]


def _word(dtype: Any) -> str:
    return str("auto" if dtype is None else dtype).strip().lower().removeprefix("torch.")


def _shown(dtype: Any) -> str:
    text = str(dtype)
    return text.removeprefix("torch.") if text.startswith("torch.") and not isinstance(dtype, str) else repr(dtype)


def _why_not(word: str) -> str:
    if word in ("float64", "double", "fp64", "f64"):
        return "models run in float32 at most (statistics are summed in float64 anyway)"
    if re.match(r"u?int|bool|complex|float[48]|fp[48]|nf4|mxfp|nvfp|q\d|bit", word):
        return "weights are read, run and written unquantized, in floating point"
    return "unknown"
