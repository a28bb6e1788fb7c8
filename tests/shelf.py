"""Sources, statistics and conversions that the tests of a family share: each is made once for all workers, and only read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from tiny import leave_out_figures, write_tiny_model

import care_mla


@dataclass(frozen=True)
class Shelf:
    """What is made in one directory of the test session, by family and recipe."""

    directory: Path
    text: Path

    def _once(self, path: Path, make: Callable[[Path], object]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():
                make(path)
        return path

    def source(self, family: str, **changes: Any) -> Path:
        """A tiny random model of a family, its configuration changed."""
        return self._once(
            self.directory / family / _name("source", changes), lambda path: write_tiny_model(path, family, **changes)
        )

    def statistics(self, family: str, **changes: Any) -> Path:
        """Everything that any recipe can ask for of that model."""

        def calibrate(path: Path) -> None:
            source = self.source(family, **changes)
            normalized = family.startswith("qwen3")  # what layout mla and --qk-norm linear can take
            text = {"calibration": str(self.text), "samples": 16, "seqlen": 48}
            care_mla.calibrate(source, path, **text, inputs=True, fisher=True, normalized=normalized)

        return self._once(self.directory / family / _name("statistics", changes), calibrate)

    def converted(self, family: str, *, changes: dict[str, Any] | None = None, **recipe: Any) -> Path:
        """That model converted by a recipe."""
        changes = changes or {}

        def convert(path: Path) -> None:
            with pytest.MonkeyPatch.context() as patch:
                leave_out_figures(patch)
                source, statistics = self.source(family, **changes), self.statistics(family, **changes)
                care_mla.convert(source, path, stats=statistics, **recipe)

        return self._once(self.directory / family / _name("converted", changes | recipe), convert)


def _name(kind: str, entries: dict[str, Any]) -> str:
    """The kind, with a digest where something was asked for."""
    if not entries:
        return kind
    return f"{kind}-{hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()[:12]}"
