"""The stages, and the only place where they meet. Every stage reads and writes saved artifacts.

A file a stage: what it does is public here, what the stages share is in `source`, `inputs`, `spectra` and `planning`.
"""

from care_mla.files import write_json
from care_mla.pipeline.conversion import convert
from care_mla.pipeline.evaluation import evaluate, write_report
from care_mla.pipeline.exporting import EXPORT_TARGETS, export
from care_mla.pipeline.fetching import KNOWN_MODELS, fetch
from care_mla.pipeline.healing import convert_and_heal, heal, kept_after_interrupt
from care_mla.pipeline.inspection import Inspection, inspect
from care_mla.pipeline.planning import RankForecast, plan_ranks, plan_uniform, plot_forecasts, require_plot
from care_mla.pipeline.source import Source, open_source, require_expressible
from care_mla.pipeline.statistics import calibrate
from care_mla.records.artifacts import EVALUATION, EXPORT, HEALING, MANIFEST, REPORT, SPECTRA, versions

__all__ = [
    "EVALUATION",
    "EXPORT",
    "EXPORT_TARGETS",
    "HEALING",
    "KNOWN_MODELS",
    "MANIFEST",
    "REPORT",
    "SPECTRA",
    "Inspection",
    "RankForecast",
    "Source",
    "calibrate",
    "convert",
    "convert_and_heal",
    "evaluate",
    "export",
    "fetch",
    "heal",
    "inspect",
    "kept_after_interrupt",
    "open_source",
    "plan_ranks",
    "plan_uniform",
    "plot_forecasts",
    "require_expressible",
    "require_plot",
    "versions",
    "write_json",
    "write_report",
]
