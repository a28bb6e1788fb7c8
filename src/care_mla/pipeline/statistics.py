"""Calibration: statistics that every method and rank can use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from care_mla.checkpoint import atomic_directory
from care_mla.checkpoint.writer import require_writable
from care_mla.config import CalibrationSettings
from care_mla.errors import ConfigError
from care_mla.pipeline.artifacts import versions
from care_mla.pipeline.source import Source, lost_features, open_source
from care_mla.pipeline.verification import require_runs, require_same_weights, require_true_spec
from care_mla.progress import Track, silent
from care_mla.stats import StatisticsStore, StatisticsWriter


def calibrate(
    source: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    device: str = "cpu",
    dtype: str = "auto",
    track: Track = silent,
    **settings: Any,
) -> Path:
    """Collect the statistics that every method and rank can use, once.

    Args:
        source: model directory or hub id.
        out: STATS directory.
        settings: fields of `CalibrationSettings`.

    Returns:
        `out`.

    Raises:
        ConversionError
    """
    chosen: CalibrationSettings = CalibrationSettings.make(**settings)
    require_writable(Path(out), overwrite)
    opened = open_source(source)
    require_true_spec(opened)
    with atomic_directory(Path(out), overwrite=overwrite) as staging:
        write_statistics(opened, staging, chosen, device=device, dtype=dtype, track=track)
    return Path(out)


def write_statistics(
    source: Source, directory: Path, settings: CalibrationSettings, *, device: str, dtype: str, track: Track
) -> None:
    from care_mla.calibration import (
        NormalizedKeysTap,
        NormalizedTap,
        collect_fisher,
        collect_moments,
        load_tokenizer,
        make_windows,
        normalized_keys_taps,
        normalized_taps,
    )  # fmt: skip
    from care_mla.calibration.corpus import SELF, parse_spec
    from care_mla.modeling import load

    has_norm = "QK-norm" in source.family.features(source.reader.config)
    if settings.normalized and not has_norm:
        raise ConfigError(
            f"--normalized: this {source.family.model_type} model has no norm of queries and keys by head"
        )
    corpus = settings.model_dump(include={"samples", "seqlen", "seed", "field", "pack"})
    tokenizer = load_tokenizer(source.directory)
    from_model = any(part.name == SELF for part in parse_spec(settings.calibration))
    windows = None if from_model else make_windows(settings.calibration, tokenizer, **corpus, track=track)
    model = load(source.directory, dtype=dtype, device=device)
    require_same_weights(source, model)
    require_runs(source, model)
    if windows is None:
        windows = make_windows(settings.calibration, tokenizer, **corpus, model=model, track=track)
    taps: list[NormalizedKeysTap] = []
    if settings.normalized:
        taps = [*normalized_taps(model, source.family, with_gradients=settings.fisher)]
    elif settings.fisher and has_norm and not lost_features(source.family, source.reader.config, "mla"):
        taps = normalized_keys_taps(model, source.family)
    options: dict[str, Any] = {"with_inputs": settings.inputs, "alongside": taps, "track": track}
    writer = StatisticsWriter(directory)
    if settings.fisher:  # half the batch: a backward pass also holds the logits and their gradient
        moments, fisher = collect_fisher(
            model, source.family, windows, seed=settings.seed, batch_size=max(1, settings.batch_size // 2), **options
        )
        for layer, layer_fisher in enumerate(fisher):
            writer.write_fisher(layer, layer_fisher)
        for layer, tap in enumerate(taps):
            writer.write_normalized_fisher(layer, tap.fisher)
    else:
        moments = collect_moments(model, source.family, windows, batch_size=settings.batch_size, **options)
    for layer, layer_moments in enumerate(moments):
        writer.write_layer(layer, layer_moments)
    for layer, tap in enumerate(taps):
        if isinstance(tap, NormalizedTap):
            writer.write_normalized(layer, tap.statistics)
    writer.write_windows(windows.to_tensors())
    writer.write_metadata(
        {
            "source": source.name,
            "source_fingerprint": source.reader.fingerprint,
            "settings": settings.model_dump(),
            "num_tokens": windows.num_tokens,
            "geometry": source.geometry.to_dict(),
            "versions": versions(),
        }
    )


def open_statistics(source: Source, directory: str | Path) -> StatisticsStore:
    statistics = StatisticsStore(Path(directory))
    statistics.require_source(source.reader.fingerprint, source.name)
    return statistics
