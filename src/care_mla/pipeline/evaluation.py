"""Evaluation of a model, and the report of a converted one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from care_mla.checkpoint import resolve_source
from care_mla.checkpoint.reader import read_json
from care_mla.errors import CheckpointError, ConfigError
from care_mla.pipeline.artifacts import EVALUATION, MANIFEST, METRICS, REPORT, SPECTRA, write_json
from care_mla.progress import Track, silent


def evaluate(
    model: str | Path,
    text: str,
    *,
    reference: str | Path | None = None,
    seqlen: int = 512,
    windows: int = 8,
    field: str | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    track: Track = silent,
) -> dict[str, Any]:
    """Evaluate a converted (or any) model on the first windows of a text.

    A converted model keeps the result beside its manifest, for the report.

    Args:
        text: a .txt, .json, .jsonl or .parquet file, or a named hub corpus.
        reference: the unconverted model.

    Raises:
        ConversionError
    """
    from care_mla.calibration import load_text, load_tokenizer
    from care_mla.evaluation import evaluate_model, evaluation_windows
    from care_mla.modeling import load, require_loadable

    directory = resolve_source(model)
    require_loadable(directory)  # before its tokenizer, which reads config.json too
    rows = evaluation_windows(
        load_tokenizer(directory), load_text(text, field=field, evaluation=True), seqlen=seqlen, windows=windows
    )
    converted = load(directory, dtype=dtype, device=device)
    original = load(reference, dtype=dtype, device=device) if reference is not None else None
    if (
        original is not None
        and original.config.get_text_config().vocab_size != converted.config.get_text_config().vocab_size
    ):
        raise ConfigError(
            f"--reference {reference} has another vocabulary than {model}; it must be the model that was converted"
        )
    result = {"text": str(text), **evaluate_model(converted, rows, reference=original, track=track).to_dict()}
    if (directory / MANIFEST).is_file():
        same = (result["text"], seqlen, windows)
        kept = [e for e in saved_evaluations(directory) if (e["text"], e["seqlen"], e["windows"]) != same]
        write_json(directory / EVALUATION, {"evaluations": [*kept, result]})
        write_report(directory)
    return result


def saved_evaluations(directory: Path) -> list[dict[str, Any]]:
    """What `evaluate` has kept beside the manifest, possibly nothing."""
    path = directory / EVALUATION
    evaluations: list[dict[str, Any]] = read_json(path)["evaluations"] if path.is_file() else []
    return evaluations


def write_report(directory: str | Path) -> Path:
    """The self-contained HTML report of a converted model, from its saved artifacts alone.

    Raises:
        CheckpointError: not a converted model.
    """
    from care_mla.report import render_report

    directory = Path(directory)
    if not (directory / MANIFEST).is_file():
        raise CheckpointError(
            f"{directory} has no {MANIFEST}; a report is made of a directory that `care convert` wrote"
        )
    metrics = directory / METRICS
    html = render_report(
        read_json(directory / MANIFEST),
        load_file(directory / SPECTRA),
        saved_evaluations(directory),
        [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()] if metrics.is_file() else None,
    )
    (directory / REPORT).write_text(html, encoding="utf-8")
    return directory / REPORT
