"""Targets that may not be written."""

from __future__ import annotations

import os

import care_mla
from refusals import CALIBRATE, CONVERT, Place, Refusal

KIND = "What is written"


def _folder(place: Place) -> None:
    place.out.mkdir()
    (place.out / "thesis.tex").write_text("theirs")


def _statistics(place: Place) -> None:
    care_mla.calibrate(place.source, place.out, calibration=str(place.text), samples=2, seqlen=16)


def _own_with_notes(place: Place) -> None:
    _statistics(place)
    (place.out / "notes.txt").write_text("theirs")


def _locked_by_nobody_else(place: Place) -> None:
    place.out.write_text("theirs")


def _markup(place: Place) -> None:
    folder = place.directory / "[" / "b] :smile:"
    folder.mkdir(parents=True)


def _not_utf8(place: Place) -> None:
    os.mkdir(os.fsencode(place.directory) + b"/caf\xe9")


OVER = "--overwrite"
CASES = [
    Refusal(KIND, "a folder of yours as --out", (*CONVERT, OVER), "has no care_files.json", _folder),
    Refusal(KIND, "statistics as --out of a conversion", (*CONVERT, OVER), "it is statistics", _statistics),
    Refusal(KIND, "statistics with a file of yours in them", (*CALIBRATE, OVER), "holds notes.txt", _own_with_notes),
    Refusal(KIND, "statistics that are there, without --overwrite", CALIBRATE, "pass --overwrite", _statistics),
    Refusal(KIND, "a file as --out", (*CALIBRATE, OVER), "is not a directory", _locked_by_nobody_else),
    Refusal(
        KIND,
        "the source as --out",
        ("calibrate", "SOURCE", "--out", "SOURCE", "--calibration", "TEXT", OVER),
        "would replace the source",
    ),
    Refusal(
        KIND,
        "a folder that holds the source",
        ("calibrate", "SOURCE", "--out", "WORK", OVER),
        "would replace the source",
    ),
    Refusal(KIND, "a folder in the source", ("fetch", "SOURCE", "SOURCE/copy"), "lies inside the source"),
    Refusal(KIND, "the current directory", ("calibrate", "SOURCE", "--out", ".", OVER), "current directory"),
    Refusal(KIND, "a name too long", ("calibrate", "SOURCE", "--out", "WORK/" + "n" * 300), "File name too long"),
    Refusal(
        KIND,
        "a path with a file in it",
        ("calibrate", "SOURCE", "--out", "TEXT/out"),
        "TEXT is not a directory",
    ),
    Refusal(
        KIND,
        "brackets and colons in a path",
        ("calibrate", "SOURCE", "--out", "WORK/[/b] :smile:", OVER),
        "WORK/[/b] :smile: exists",
        lambda place: (_markup(place), (place.directory / "[" / "b] :smile:" / "thesis.tex").touch()),
    ),
    Refusal(
        KIND,
        "a path that is not UTF-8",
        ("report", "WORK/caf\udce9"),
        "caf\\udce9 has no care_manifest.json",
        _not_utf8,
    ),
    Refusal(
        KIND,
        "a file of yours as --plot",
        ("plan", "SOURCE", "--stats", "OUT", "--plot", "WORK/chart.svg"),
        "care did not write it",
        lambda place: (place.directory / "chart.svg").write_text("<svg/>"),
    ),
    Refusal(
        KIND,
        "a file of yours as --json",
        ("eval", "SOURCE", "--text", "TEXT", "--json", "SOURCE/config.json"),
        "care did not write it",
    ),
]
