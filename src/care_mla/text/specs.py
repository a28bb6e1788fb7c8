"""What `--calibration` and `--data` name: corpora and their shares."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from care_mla.errors import ConfigError

SELF = "self"
"""Text sampled from the model itself."""
COPY = "copy"
"""Random tokens said twice. Ordinary text hardly shows how a model copies, and what it does not show, a conversion drops."""


@dataclass(frozen=True)
class CorpusPart:
    """One term of a calibration SPEC."""

    name: str
    weight: float


def parse_spec(spec: str) -> list[CorpusPart]:
    """`alpaca:0.5,notes.jsonl:0.5` -> parts with weights that sum to one; a part without a weight counts 1.

    A file that exists is taken as one, whatever commas and colons are in its name.

    Raises:
        ConfigError: an empty part, or a weight that is not a positive number.
    """
    parts = []
    for term in _terms(spec):
        name, weight = _weighted(term)
        if not name.strip() or not 0 < weight < math.inf:
            raise ConfigError(f"calibration {spec!r}: {term!r} is not NAME or NAME:WEIGHT with a positive weight")
        parts.append(CorpusPart(name, weight))
    largest = max(part.weight for part in parts)  # before the sum, which may overflow
    total = sum(part.weight / largest for part in parts)
    return [CorpusPart(part.name, part.weight / largest / total) for part in parts]


def require_distinct(parts: list[CorpusPart], spec: str) -> None:
    """Refuse a corpus that is named twice: its parts would share text, and held-out text would be trained on.

    Raises:
        ConfigError
    """
    seen: set[str] = set()
    for part in parts:
        place = str(Path(part.name).expanduser().resolve()) if _exists(part.name) else part.name
        if place in seen:
            raise ConfigError(f"{spec!r} names {part.name} twice; name it once, with the sum of the weights")
        seen.add(place)


def share(total: int, weights: list[float]) -> list[int]:
    """Split a count by weights, at least one each (largest remainder)."""
    counts = [max(1, int(total * weight)) for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda i: counts[i] - total * weights[i])
    for i in range(max(0, total - sum(counts))):
        counts[by_remainder[i % len(counts)]] += 1
    while sum(counts) > max(total, len(counts)):  # what the least shares got came from the largest
        counts[counts.index(max(counts))] -= 1
    return counts


def _terms(spec: str) -> Iterator[str]:
    """Between commas, or around them where that names a file."""
    pieces = spec.split(",")
    start = 0
    while start < len(pieces):
        joined = ((end, ",".join(pieces[start:end]).strip()) for end in range(len(pieces), start + 1, -1))
        end, term = next(
            ((end, term) for end, term in joined if _exists(_weighted(term)[0])), (start + 1, pieces[start].strip())
        )
        yield term
        start = end


def _weighted(term: str) -> tuple[str, float]:
    """Name and weight of a term."""
    name, colon, tail = term.rpartition(":")
    if not colon or _exists(term):
        return term, 1.0
    try:
        return name, float(tail)
    except ValueError:  # a colon of the path
        return term, 1.0


def _exists(name: str) -> bool:
    try:
        return bool(name) and Path(name).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # no path of this system, or below a directory that may not be read
        return False
