"""The stages, and the only place where they meet. Every stage reads and writes saved artifacts.

A file a stage: what it does is public here, what the stages share is in `source`, `inputs` and `verification`. Names
are imported when they are first used.
"""

from typing import TYPE_CHECKING

from care_mla.lazy import on_first_use

if TYPE_CHECKING:
    from care_mla.files import write_json
    from care_mla.healing.unfinished import kept_after_interrupt
    from care_mla.pipeline.calibrate import calibrate
    from care_mla.pipeline.convert import convert
    from care_mla.pipeline.convert_and_heal import convert_and_heal
    from care_mla.pipeline.evaluate import evaluate
    from care_mla.pipeline.export import EXPORT_TARGETS, export
    from care_mla.pipeline.fetch import KNOWN_MODELS, fetch
    from care_mla.pipeline.heal import heal
    from care_mla.pipeline.inspect import Inspection, inspect
    from care_mla.pipeline.plan import plan_ranks, plan_uniform, plot_forecasts, require_plot
    from care_mla.pipeline.report import write_report
    from care_mla.pipeline.source import open_source
    from care_mla.records.artifacts import EVALUATION, EXPORT, HEALING, MANIFEST, REPORT, SPECTRA, versions

on_first_use(
    __name__,
    {
        "care_mla.files": ("write_json",),
        "care_mla.healing.unfinished": ("kept_after_interrupt",),
        "care_mla.records.artifacts": ("EVALUATION", "EXPORT", "HEALING", "MANIFEST", "REPORT", "SPECTRA", "versions"),
        "care_mla.pipeline.convert": ("convert",),
        "care_mla.pipeline.convert_and_heal": ("convert_and_heal",),
        "care_mla.pipeline.evaluate": ("evaluate",),
        "care_mla.pipeline.export": ("EXPORT_TARGETS", "export"),
        "care_mla.pipeline.fetch": ("KNOWN_MODELS", "fetch"),
        "care_mla.pipeline.heal": ("heal",),
        "care_mla.pipeline.inspect": ("Inspection", "inspect"),
        "care_mla.pipeline.plan": ("plan_ranks", "plan_uniform", "plot_forecasts", "require_plot"),
        "care_mla.pipeline.source": ("open_source",),
        "care_mla.pipeline.calibrate": ("calibrate",),
        "care_mla.pipeline.report": ("write_report",),
    },
)
