"""What care refuses, and the sentence it says: one list of cases a kind of input, and the table of docs/troubleshooting.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Place:
    """Where a case is tried.

    Attributes:
        directory: everything of the case is below it.
        source: a tiny Llama with its tokenizer, to be damaged.
        out: what is written; absent unless the case makes it.
        text: enough text to calibrate on.
    """

    directory: Path
    source: Path
    out: Path
    text: Path

    @property
    def names(self) -> dict[str, str]:
        """Words of a command, and the paths they stand for."""
        paths = {"SOURCE": self.source, "OUT": self.out, "TEXT": self.text, "WORK": self.directory}
        return {name: str(path) for name, path in paths.items()}


@dataclass(frozen=True)
class Refusal:
    """One input that is refused in one sentence, before anything is written.

    Attributes:
        kind: heading in the table.
        given: what the user has or does, as the table says it.
        command: words after `care`; SOURCE, OUT, TEXT and WORK inside them stand for the paths of the `Place`.
        says: part of the sentence that must be there.
        prepare: makes the input from an intact place.
        code: exit code; 2 is a misused option.
    """

    kind: str
    given: str
    command: tuple[str, ...]
    says: str
    prepare: Callable[[Place], object] = lambda place: None
    code: int = 1

    @property
    def id(self) -> str:
        return f"{self.kind}: {self.given}"


CONVERT = (
    "convert",
    "SOURCE",
    "--out",
    "OUT",
    "--kv-save",
    "0.5",
    "--calibration",
    "TEXT",
    "--samples",
    "4",
    "--seqlen",
    "32",
)
"""A conversion that works on an intact place."""
CALIBRATE = ("calibrate", "SOURCE", "--out", "OUT", "--calibration", "TEXT", "--samples", "4", "--seqlen", "32")


def said(printed: str, place: Place) -> str:
    """The sentence of a refusal, with the names of the paths in it."""
    for name, path in sorted(place.names.items(), key=lambda item: -len(item[1])):
        printed = printed.replace(path, name)
    return printed.strip().removeprefix("error: ")
