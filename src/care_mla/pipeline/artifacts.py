"""Names of the saved artifacts, and how they are written."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

MANIFEST = "care_manifest.json"


SPECTRA = "care_spectra.safetensors"


EVALUATION = "care_eval.json"


REPORT = "care_report.html"


EXPORT = "care_export.json"
HEALING = "care_heal.json"


METRICS = "care_heal.jsonl"
"""Of a healing run: one line a step and one an evaluation."""


def versions() -> dict[str, str]:
    """Versions that decide what was computed."""
    packages = ("care-mla", "torch", "transformers", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def inputs_of(
    *,
    source: str | Path | None = None,
    stats: str | Path | None = None,
    teacher: str | Path | None = None,
    text: str | None = None,
) -> list[tuple[str, Path]]:
    """What a command reads, as far as it is on this disk, and what messages call it; see `checkpoint.outputs`.

    Args:
        text: SPEC of a calibration or training text.
    """
    from care_mla.calibration.specs import parse_spec

    named = [("the source", source), ("the statistics", stats), ("the teacher", teacher)]
    named += [("the text", part.name) for part in parse_spec(text)] if text is not None else []
    paths = [(name, Path(path).expanduser()) for name, path in named if path is not None]
    return [(name, path) for name, path in paths if os.path.lexists(path)]
