"""care-mla: turn a pretrained MHA/GQA language model into Multi-head Latent Attention with the least possible loss.

Names are imported when they are first used. Importing this makes `model_type` care_mla known to transformers' AutoConfig and
AutoModelForCausalLM, now or as soon as transformers is imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from care_mla import registration

if TYPE_CHECKING:
    from care_mla.errors import ConversionError
    from care_mla.families import FamilySpec, register_family
    from care_mla.modeling import LatentCache, load
    from care_mla.pipeline import (
        calibrate,
        convert,
        evaluate,
        export,
        fetch,
        heal,
        inspect,
        plan_ranks,
        plan_uniform,
        write_report,
    )

__version__ = "0.1.0"
_HOMES = {
    "care_mla.errors": ("ConversionError",),
    "care_mla.families": ("FamilySpec", "register_family"),
    "care_mla.modeling": ("LatentCache", "load"),
    "care_mla.pipeline": (
        "calibrate",
        "convert",
        "evaluate",
        "export",
        "fetch",
        "heal",
        "inspect",
        "plan_ranks",
        "plan_uniform",
        "write_report",
    ),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = [
    "ConversionError",
    "FamilySpec",
    "LatentCache",
    "calibrate",
    "convert",
    "evaluate",
    "export",
    "fetch",
    "heal",
    "inspect",
    "load",
    "plan_ranks",
    "plan_uniform",
    "register_family",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


registration.with_transformers()
