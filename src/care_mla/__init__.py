"""care-mla: turn a pretrained MHA/GQA language model into Multi-head Latent Attention with the least possible loss.

Importing this registers `model_type` care_mla with transformers' AutoConfig and AutoModelForCausalLM.
"""

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
