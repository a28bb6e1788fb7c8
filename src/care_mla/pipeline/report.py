"""The report of a converted model, from what is saved in its directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from care_mla.checkpoint import locked
from care_mla.errors import CheckpointError
from care_mla.files import read_json, write_text
from care_mla.records.artifacts import EVALUATION, MANIFEST, METRICS, REPORT, SPECTRA


def saved_evaluations(directory: Path) -> list[dict[str, Any]]:
    """What `evaluate` has kept beside the manifest, possibly nothing.

    Raises:
        CheckpointError: damaged.
    """
    path = directory / EVALUATION
    if not path.is_file():
        return []
    evaluations = read_json(path).get("evaluations")
    needed = {"text", "seqlen", "windows", "perplexity", "loss", "cache", "reference_loss", "reference_cache"}
    if not isinstance(evaluations, list) or any(not isinstance(e, dict) or needed - e.keys() for e in evaluations):
        raise CheckpointError(f"{path} holds no list of evaluations; delete it, and evaluate again what it held")
    return evaluations


def write_report(directory: str | Path) -> Path:
    """The self-contained HTML report of a converted model, from its saved artifacts alone.

    Raises:
        CheckpointError: not a converted model, or its artifacts are damaged.
    """
    directory = Path(directory)
    if not (directory / MANIFEST).is_file():
        raise CheckpointError(
            f"{directory} has no {MANIFEST}; a report is made of a directory that `care convert` wrote"
        )
    with locked(directory):
        draw_report(directory)
    return directory / REPORT


def draw_report(directory: Path) -> None:
    """As `write_report`, in a directory that this process holds."""
    from care_mla.report import render_report

    metrics = directory / METRICS
    try:
        energies = load_file(directory / SPECTRA)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{directory / SPECTRA} cannot be read ({str(error).strip().splitlines()[0]}); the report needs it: convert again"
        ) from error
    html = render_report(
        read_json(directory / MANIFEST),
        energies,
        saved_evaluations(directory),
        [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()] if metrics.is_file() else None,
    )
    write_text(directory / REPORT, html)
