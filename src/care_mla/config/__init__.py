"""Typed settings, a file a stage; the command line is generated from them, and the Python API takes the same names. No torch here."""

from care_mla.config.base import LARGEST_SEED, Option, Settings, takes
from care_mla.config.calibrate import CalibrationSettings, TextSettings
from care_mla.config.convert import Recipe
from care_mla.config.dtypes import DTYPES, DType, Precision, named_dtype, named_precision
from care_mla.config.evaluate import EvaluationSettings
from care_mla.config.export import ExportSettings
from care_mla.config.heal import HealSettings
from care_mla.config.plan import PLANNED, PlanSettings

__all__ = [
    "DTYPES",
    "LARGEST_SEED",
    "PLANNED",
    "CalibrationSettings",
    "DType",
    "EvaluationSettings",
    "ExportSettings",
    "HealSettings",
    "Option",
    "PlanSettings",
    "Precision",
    "Recipe",
    "Settings",
    "TextSettings",
    "named_dtype",
    "named_precision",
    "takes",
]
