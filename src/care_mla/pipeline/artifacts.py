"""Names of the saved artifacts, and how they are written."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

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


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Pretty JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
