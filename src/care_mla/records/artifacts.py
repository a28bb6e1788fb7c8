"""Names of the files in a written directory, and the versions that every record names."""

from __future__ import annotations

import platform
from importlib.metadata import version

MANIFEST = "care_manifest.json"
"""Of a converted model: what it was made from, how, and what that lost."""
SPECTRA = "care_spectra.safetensors"
"""Of a converted model: the eigenvalues that ranks were chosen from."""
EVALUATION = "care_eval.json"
REPORT = "care_report.html"
EXPORT = "care_export.json"
HEALING = "care_heal.json"
"""Of a healed model: a `records.healing.HealingRecord`."""
METRICS = "care_heal.jsonl"
"""Of a healing run: one line a step and one an evaluation."""


def versions() -> dict[str, str]:
    """Versions that decide what was computed."""
    packages = ("care-mla", "torch", "transformers", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
