"""Conversion: statistics and a recipe become a checkpoint, a manifest and a report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from care_mla.checkpoint import Kind, claim, require_output, workspace
from care_mla.config import CalibrationSettings, Recipe
from care_mla.conversion.compare import best_candidate
from care_mla.conversion.decide import Decision, decide, statistics_needed
from care_mla.conversion.evidence import SharedEigenpairs, open_statistics, require_statistics
from care_mla.conversion.layer import converted_layer, predicted_total
from care_mla.conversion.source import Source
from care_mla.conversion.spectra import Spectra
from care_mla.conversion.writer import ConvertedWriter
from care_mla.errors import ConfigError
from care_mla.files import write_json, write_tensors
from care_mla.layouts import dense_projections
from care_mla.pipeline.calibrate import kept_bytes, write_statistics
from care_mla.pipeline.inputs import inputs_of
from care_mla.pipeline.report import draw_report
from care_mla.pipeline.source import open_source
from care_mla.pipeline.verification import require_same_weights, require_true_spec
from care_mla.progress import Track, shown
from care_mla.ranks import RankPlan
from care_mla.records.artifacts import MANIFEST, SPECTRA, versions
from care_mla.runtime import memory_named, resolve_device
from care_mla.stats import StatisticsStore

if TYPE_CHECKING:
    from care_mla.calibration import Propagation

REFIT_LOWER = "lower --refit-tokens or --seqlen, choose another --device, or use --no-refit"
"""What takes less memory where the refit runs short."""


def convert(
    source: str | Path,
    out: str | Path,
    *,
    stats: str | Path | None = None,
    calibration: dict[str, Any] | None = None,
    overwrite: bool = False,
    device: str | int | torch.device | None = None,
    track: Track = shown,
    **recipe: Any,
) -> dict[str, Any]:
    """Convert a checkpoint to the latent layout.

    Args:
        source: model directory or hub id.
        out: directory of the converted model; appears whole or not at all.
        stats: STATS directory of `calibrate`; without it, the source is calibrated first as `calibration` says.
        calibration: fields of `CalibrationSettings`.
        device: of the forward passes, see `runtime.resolve_device`.
        recipe: fields of `Recipe`.

    Returns:
        The manifest, as saved in `out`.

    Raises:
        ConversionError: nothing is left at `out` then.
    """
    chosen: Recipe = Recipe.make(**recipe)
    if stats is not None and calibration:
        raise ConfigError(
            "give either --stats or calibration options, not both: the statistics say what they were calibrated on"
        )
    settings: CalibrationSettings = CalibrationSettings.make(**{**statistics_needed(chosen), **(calibration or {})})
    where = resolve_device(device)
    out = Path(out)
    inputs = inputs_of(source=source, stats=stats, text=None if stats is not None else settings.calibration)
    require_output(out, Kind.CONVERTED, inputs, overwrite=overwrite)
    opened = open_source(source)
    inputs += inputs_of(source=opened.directory)
    require_true_spec(opened)
    candidates = decide(opened.facts, opened.family.model_type, chosen)
    statistics = open_statistics(opened, stats) if stats is not None else None
    if statistics is not None:
        require_statistics(statistics, chosen)

    needed = opened.reader.num_bytes + (0 if statistics is not None else kept_bytes(opened, settings))
    with (
        claim(out, Kind.CONVERTED, inputs, overwrite=overwrite) as claimed,
        claimed.staging(needed) as staging,
        workspace(staging) as work,
    ):
        if statistics is None:
            write_statistics(opened, work, settings, device=where, dtype="auto", track=track)
            statistics = StatisticsStore(work)
        shared = SharedEigenpairs(work) if len(candidates) > 1 else None
        decision, predicted = best_candidate(opened, statistics, candidates, shared, track)
        spectra = Spectra(opened, statistics, decision, work, shared=shared, track=track)
        plan = spectra.allocate()
        layers = _write_layers(spectra, plan, opened, statistics, where, staging, track)
        write_tensors(staging / SPECTRA, spectra.named_energies())
        manifest = {
            "format": "care-mla manifest 1",
            "source": {
                "name": opened.name,
                "fingerprint": opened.reader.fingerprint,
                "model_type": opened.family.model_type,
                "geometry": opened.geometry.to_dict(),
            },
            "recipe": decision.acted,
            "plan": plan.to_dict(),
            "cache_elements_per_token": plan.cache_elements_per_token,
            "source_cache_elements_per_token": opened.geometry.cache_elements_per_token,
            "kv_save": plan.kv_save(opened.geometry),
            "predicted_loss_increase": predicted_total(layers),
            "predicted_by_rotary_width": predicted,
            "layers": layers,
            "notes": spectra.notes,
            "calibration": statistics.metadata,
            "versions": versions(),
        }
        write_json(staging / MANIFEST, manifest)
        draw_report(staging)
    return manifest


def _write_layers(
    spectra: Spectra,
    plan: RankPlan,
    source: Source,
    statistics: StatisticsStore,
    device: torch.device,
    directory: Path,
    track: Track,
) -> list[dict[str, Any]]:
    """The converted checkpoint, layer by layer; returns what the manifest says of each."""
    from care_mla.modeling import LANGUAGE_MODEL, converted_config

    decision = spectra.decision
    refit = bool(decision.recipe.refit)
    propagation = _propagation(source, statistics, decision, device) if refit else None
    writer = ConvertedWriter(source, decision.recipe, directory, prefix=f"{LANGUAGE_MODEL}.")
    records = []
    title = "Refitting and writing layers" if refit else "Writing layers"
    for layer in track(range(len(plan.ranks)), title, len(plan.ranks), unit="layers"):
        converted = converted_layer(spectra, plan, layer)
        tensors, record = converted.tensors, converted.record
        if propagation is not None:
            with memory_named("output projections were refitted", device, REFIT_LOWER):
                refitted = propagation.refit(layer, dense_projections(tensors))
            tensors["o_proj.weight"] = refitted.weight
            record["output_error"] = {"before": refitted.error_before, "after": refitted.error_after}
        writer.add_layer(layer, tensors)
        records.append(record)
    writer.finish()
    entries = plan.layout.config_entries(plan.ranks, writer.biases, spectra.contents, decision.options)
    dtype = str(writer.dtype).removeprefix("torch.")
    write_json(
        directory / "config.json", converted_config(source.reader.config, plan.layout.name, entries, dtype=dtype)
    )
    return records


def _propagation(source: Source, statistics: StatisticsStore, decision: Decision, device: torch.device) -> Propagation:
    """Both models side by side, for the refit."""
    from care_mla.calibration import Propagation
    from care_mla.modeling import load
    from care_mla.text import TokenWindows

    windows = TokenWindows.from_tensors(statistics.windows()).thinned(decision.recipe.refit_tokens)
    model = load(source.directory, device=device)
    require_same_weights(source, model)
    with memory_named("the text was read for the refit", device, REFIT_LOWER):
        return Propagation(model, source.family, windows, ridge=decision.recipe.refit_ridge)
