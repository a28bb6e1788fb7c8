"""care-mla: turn a pretrained MHA/GQA language model into Multi-head Latent Attention with the least possible loss.

Names are imported when they are first used. Importing this makes `model_type` care_mla known to transformers' AutoConfig and
AutoModelForCausalLM, now or as soon as transformers is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from care_mla import registration
from care_mla.lazy import on_first_use

if TYPE_CHECKING:
    from care_mla.config import CalibrationSettings, EvaluationSettings, ExportSettings, HealSettings, Recipe
    from care_mla.errors import (
        CalibrationError,
        CheckpointError,
        ConfigError,
        ConversionError,
        HealingError,
        NumericalError,
        RankError,
        UnsupportedModelError,
    )
    from care_mla.families import FamilySpec, register_family
    from care_mla.modeling import LatentCache, load
    from care_mla.pipeline import (
        calibrate,
        convert,
        convert_and_heal,
        evaluate,
        export,
        fetch,
        inspect,
        plan_ranks,
        plan_uniform,
        write_report,
    )
    from care_mla.pipeline.heal import heal

__version__ = "0.1.0"
on_first_use(
    __name__,
    {
        "care_mla.config": ("CalibrationSettings", "EvaluationSettings", "ExportSettings", "HealSettings", "Recipe"),
        "care_mla.errors": (
            "CalibrationError",
            "CheckpointError",
            "ConfigError",
            "ConversionError",
            "HealingError",
            "NumericalError",
            "RankError",
            "UnsupportedModelError",
        ),
        "care_mla.families": ("FamilySpec", "register_family"),
        "care_mla.modeling": ("LatentCache", "load"),
        "care_mla.pipeline": (
            "calibrate",
            "convert",
            "convert_and_heal",
            "evaluate",
            "export",
            "fetch",
            "heal",
            "inspect",
            "plan_ranks",
            "plan_uniform",
            "write_report",
        ),
    },
)

registration.with_transformers()
