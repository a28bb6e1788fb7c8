"""Calibration: statistics that every method and rank can use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from care_mla.checkpoint import Kind, claim, require_output, workspace
from care_mla.config import CalibrationSettings
from care_mla.conversion.source import Source
from care_mla.errors import ConfigError
from care_mla.layouts import MLA, lost_features
from care_mla.pipeline.inputs import inputs_of
from care_mla.pipeline.source import open_source
from care_mla.pipeline.verification import require_runs, require_same_weights, require_true_spec
from care_mla.progress import Track, shown
from care_mla.records.artifacts import versions
from care_mla.runtime import dtype_name, memory_named, resolve_device, resolve_dtype
from care_mla.stats import StatisticsWriter


def calibrate(
    source: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    device: str | int | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    track: Track = shown,
    **settings: Any,
) -> Path:
    """Collect the statistics that every method and rank can use, once.

    Args:
        source: model directory or hub id.
        out: STATS directory.
        device, dtype: of the forward passes, see `runtime.resolve_device` and `runtime.resolve_dtype`.
        settings: fields of `CalibrationSettings`.

    Returns:
        `out`.

    Raises:
        ConversionError
    """
    chosen: CalibrationSettings = CalibrationSettings.make(**settings)
    where, precision = resolve_device(device), resolve_dtype(dtype)
    out = Path(out)
    inputs = inputs_of(source=source, text=chosen.calibration)
    require_output(out, Kind.STATISTICS, inputs, overwrite=overwrite)
    opened = open_source(source)
    inputs += inputs_of(source=opened.directory)
    require_true_spec(opened)
    with (
        claim(out, Kind.STATISTICS, inputs, overwrite=overwrite) as claimed,
        claimed.staging(kept_bytes(opened, chosen)) as staging,
    ):
        write_statistics(opened, staging, chosen, device=where, dtype=precision, track=track)
    return out


def kept_bytes(source: Source, settings: CalibrationSettings) -> int:
    """What a calibration keeps on disk while it runs: the inputs of all layers, for the way back."""
    tokens = settings.samples * settings.seqlen if settings.fisher else 0
    return tokens * source.geometry.hidden_size * source.geometry.num_layers * source.dtype.itemsize


def write_statistics(
    source: Source,
    directory: Path,
    settings: CalibrationSettings,
    *,
    device: torch.device,
    dtype: torch.dtype | str,
    track: Track,
) -> None:
    from care_mla.calibration import WITHOUT_FISHER, collect_fisher, collect_moments
    from care_mla.modeling import load
    from care_mla.text import embedding_rows, load_tokenizer, make_windows
    from care_mla.text.specs import SELF, parse_spec

    has_norm = "QK-norm" in source.family.features(source.reader.config)
    if settings.normalized and not has_norm:
        raise ConfigError(
            f"--normalized: this {source.family.model_type} model has no norm of queries and keys by head"
        )
    lost = lost_features(source.facts.features, MLA)
    if settings.normalized and lost:
        raise ConfigError(
            f"--normalized serves layout mla, which this {source.family.model_type} model cannot have ({', '.join(lost)}); leave it out"
        )
    corpus: dict[str, Any] = settings.model_dump(include={"samples", "seqlen", "seed", "field", "pack"})
    corpus["vocabulary"] = embedding_rows(source.directory)
    tokenizer = load_tokenizer(source.directory)
    from_model = any(part.name == SELF for part in parse_spec(settings.calibration))
    windows = None if from_model else make_windows(settings.calibration, tokenizer, **corpus, track=track)
    model = load(source.directory, dtype=dtype, device=device)
    require_same_weights(source, model)
    lower = f"lower --batch-size (now {settings.batch_size}) or --seqlen (now {settings.seqlen}), or choose another --device"
    with memory_named("the model was tried", device, lower):
        require_runs(source, model)
    if windows is None:
        with memory_named("text was sampled from the model", device, "lower --seqlen, or choose another --device"):
            windows = make_windows(settings.calibration, tokenizer, **corpus, model=model, track=track)
    writer = StatisticsWriter(directory)
    options: dict[str, Any] = {"with_inputs": settings.inputs, "normalized": settings.normalized, "track": track}
    if settings.fisher:  # half the batch: the way back also holds the logits and their gradient
        half = max(1, settings.batch_size // 2)
        at_norm = has_norm and not lost
        with (
            memory_named("Fisher statistics were collected", device, f"{lower}, or {WITHOUT_FISHER}"),
            workspace(directory, "inputs") as inputs,
        ):
            collect_fisher(
                model, source.family, windows, writer, seed=settings.seed, normalized_keys=at_norm,
                batch_size=half, inputs=inputs, **options,
            )  # fmt: skip
    else:
        with memory_named("moments were collected", device, lower):
            collect_moments(model, source.family, windows, writer, batch_size=settings.batch_size, **options)
    writer.write_windows(windows.to_tensors())
    writer.write_metadata(
        {
            "source": source.name,
            "source_fingerprint": source.reader.fingerprint,
            "settings": settings.model_dump(),
            "num_tokens": windows.num_tokens,
            "dtype": dtype_name(model.dtype),
            "device": device.type,
            "notes": list(windows.notes),
            "geometry": source.geometry.to_dict(),
            "versions": versions(),
        }
    )
