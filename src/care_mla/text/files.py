"""Text and records of local files, read in pieces; what is no text is refused with its place."""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from care_mla.errors import CalibrationError
from care_mla.text.hub import hub_dataset

PIECE = 1 << 18
"""Bytes of a text file that are read at once."""


def guarded(path: Path, items: Iterator[Any]) -> Iterator[Any]:
    """The items; what the system refuses on the way is said of the file."""
    try:
        yield from items
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror or error}") from error


def file_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Records of a file, and where each is."""
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return _json_lines(path)
    if suffix == ".json":
        return _JsonReader(path).records()
    return hub_dataset(str(path), "parquet", data_files=str(path), split="train")


def read_text(path: Path) -> Iterator[str]:
    """A UTF-8 file in pieces, line ends as newlines, without a byte order mark.

    Raises:
        CalibrationError: another encoding, or no text at all.
    """
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    position = 0
    with path.open("rb") as file:
        while True:
            data = file.read(PIECE)
            if not position:
                _require_not_utf16(path, data)
            start = position - len(decoder.getstate()[0])
            try:
                piece = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, error, f"position {start + error.start}") from error
            if "\0" in piece:
                raise CalibrationError(f"{path} is not text: it holds zero bytes; save it as UTF-8 text")
            position += len(data)
            if piece:
                yield piece
            if not data:
                return


def _require_not_utf16(path: Path, data: bytes) -> None:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise CalibrationError(f"{path} is not UTF-8 text: it begins as UTF-16 does; save it as UTF-8")


def _not_utf8(path: Path, error: UnicodeDecodeError, place: str) -> CalibrationError:
    byte = error.object[error.start]
    return CalibrationError(f"{path} is not UTF-8 text: byte 0x{byte:02x} at {place}; save it as UTF-8")


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """One JSON value a line; newlines alone end lines, as JSON may hold other line separators in its strings."""
    with path.open("rb") as file:
        for number, data in enumerate(file, 1):
            if number == 1:
                _require_not_utf16(path, data)
                data = data.removeprefix(codecs.BOM_UTF8)
            try:
                line = data.decode("utf-8").rstrip("\r\n")
                if line.strip():
                    yield f"{path}, line {number}", json.loads(line)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, error, f"line {number}") from error
            except (ValueError, RecursionError) as error:
                raise CalibrationError(
                    f"{path} is not valid JSONL (one value a line), line {number}: {_json_fault(error)}"
                ) from error


def _json_fault(error: ValueError | RecursionError) -> str:
    """What is wrong with a JSON value, without where."""
    if isinstance(error, json.JSONDecodeError):
        return error.msg.removesuffix(" at").removesuffix(" starting")
    return "a number of too many digits" if isinstance(error, ValueError) else "nested too deeply"


_WHITE_SPACE = re.compile(r"[ \t\n\r]*")


class _JsonReader:
    """Values of a .json file one by one: the elements of a list, or values one after another; only one is held."""

    def __init__(self, path: Path):
        self.path = path
        self.pieces = read_text(path)
        self.text, self.at = "", 0
        self.line = 1  # of the first character held
        self.decoder = json.JSONDecoder()

    def records(self) -> Iterator[tuple[str, Any]]:
        """Each value, and where it is.

        Raises:
            CalibrationError: not valid JSON.
        """
        number = 0
        listed = self._next() == "["
        self.at += listed
        more = self._next() not in ("", "]") if listed else bool(self._next())
        while more:
            number += 1
            yield f"{self.path}, record {number}", self._value()
            more = bool(self._next())
            if listed:
                more = self._next() == ","
                self.at += more
                self._next()
        if listed:
            if self._next() != "]":
                raise self._fault("expecting ',' or ']'", self.at)
            self.at += 1
            if self._next():
                raise self._fault("text after the end of the list", self.at)

    def _next(self) -> str:
        """The next character that is not white space, where `at` then is; empty at the end."""
        while True:
            space = _WHITE_SPACE.match(self.text, self.at)
            assert space is not None  # of any length, 0 too
            self.at = space.end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._grow():
                return ""

    def _grow(self) -> bool:
        """Drop what has been read, and hold at least twice as much as is left; False at the end of the file."""
        self.line += self.text.count("\n", 0, self.at)
        held, added = [self.text[self.at :]], 0
        for piece in self.pieces:
            held.append(piece)
            added += len(piece)
            if added >= len(held[0]):
                break
        self.text, self.at = "".join(held), 0
        return added > 0

    def _value(self) -> Any:
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                # Either the value goes on beyond what is held, or it is wrong.
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - len("-Infinity")
                if not (cut and self._grow()):
                    raise self._fault(_json_fault(error), error.pos) from error
                continue
            except (ValueError, RecursionError) as error:
                raise self._fault(_json_fault(error), self.at) from error
            if end == len(self.text) and self._grow():  # a number may go on
                continue
            self.at = end
            return value

    def _fault(self, what: str, position: int) -> CalibrationError:
        line = self.line + self.text.count("\n", 0, position)
        return CalibrationError(f"{self.path} is not valid JSON, line {line}: {what}")
