"""What a command reads, as its messages call it."""

from __future__ import annotations

import os
from pathlib import Path


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
    from care_mla.text.specs import parse_spec

    named = [("the source", source), ("the statistics", stats), ("the teacher", teacher)]
    named += [("the text", part.name) for part in parse_spec(text)] if text is not None else []
    paths = [(name, Path(path).expanduser()) for name, path in named if path is not None]
    return [(name, path) for name, path in paths if os.path.lexists(path)]
