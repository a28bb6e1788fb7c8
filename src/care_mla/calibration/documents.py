"""Text of files and hub corpora, read in pieces: what is not needed is not held."""

from __future__ import annotations

import codecs
import io
import json
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from care_mla.calibration.chat import chat_text, first_line, is_chat, kind_of
from care_mla.calibration.specs import COPY, SELF
from care_mla.errors import CalibrationError


@dataclass(frozen=True)
class HubCorpus:
    """Where `datasets` finds a corpus, and the field that holds its text (None: the record is formatted as a prompt)."""

    path: str
    name: str | None
    field: str | None
    calibration_split: str
    evaluation_split: str
    streaming: bool = False
    revision: str | None = None


HUB_CORPORA = {
    "alpaca": HubCorpus("tatsu-lab/alpaca", None, None, "train", "train"),
    "wikitext2": HubCorpus("Salesforce/wikitext", "wikitext-2-raw-v1", "text", "train", "test"),
    "c4": HubCorpus("allenai/c4", "en", "text", "train", "validation", streaming=True),
    # A script repository; `datasets` no longer runs scripts, so the hub's own parquet conversion is read.
    "ptb": HubCorpus(
        "ptb-text-only/ptb_text_only", "penn_treebank", "sentence", "train", "test", revision="refs/convert/parquet"
    ),
}
MAX_DOCUMENTS = 5000
"""Documents taken from a streamed corpus for calibration or evaluation."""
SEPARATOR = "\n\n"
"""Between documents that are joined."""
PIECE = 1 << 18
"""Bytes of a text file that are read at once."""
SUFFIXES = (".txt", ".json", ".jsonl", ".parquet")

Document = Iterable[str]
"""One text, in pieces that follow one another; to be read once, before the next document is asked for."""


def stream_documents(
    name: str,
    *,
    field: str | None = None,
    evaluation: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Iterator[Document]:
    """Documents of a local file or of a named hub corpus, one by one; blank ones are left out. A .txt file is one document.

    Args:
        field: of a record, that holds its text or messages; None: the first known one, see `record_text`.
        evaluation: the split for evaluation, of a hub corpus.
        tokenizer: for its chat template, which writes records that are chats.

    Raises:
        CalibrationError: missing, unreadable, not text, or empty.
    """
    path = _file(name)
    documents: Iterator[Document]
    if path is None:
        documents = _written(_hub_records(name, evaluation), field or HUB_CORPORA[name].field, tokenizer)
    elif path.suffix.lower() == ".txt":
        documents = iter([_guarded(path, _read_text(path))])
    else:
        documents = _written(_guarded(path, _file_records(path)), field, tokenizer)
    empty = True
    for document in documents:
        pieces = _from_first_word(document)
        if pieces is not None:
            empty = False
            yield pieces
    if empty:
        raise CalibrationError(f"{name} holds no text")


def corpus_reader(
    name: str,
    *,
    field: str | None = None,
    evaluation: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Callable[[], Iterator[Document]]:
    """As `stream_documents`, from the start with every call; of a streamed hub corpus the first `MAX_DOCUMENTS`, kept in memory."""

    def read() -> Iterator[Document]:
        return stream_documents(name, field=field, evaluation=evaluation, tokenizer=tokenizer)

    if _file(name) is None and HUB_CORPORA[name].streaming:
        kept = [list(document) for document in islice(read(), MAX_DOCUMENTS)]
        return lambda: iter(kept)
    return read


def joined(documents: Iterable[Document]) -> Iterator[str]:
    """All documents in pieces, with blank lines between them."""
    for number, document in enumerate(documents):
        if number:
            yield SEPARATOR
        yield from document


def load_documents(
    name: str,
    *,
    field: str | None = None,
    evaluation: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[str]:
    """All documents of a corpus, in memory.

    Raises:
        CalibrationError: as of `stream_documents`.
    """
    read = corpus_reader(name, field=field, evaluation=evaluation, tokenizer=tokenizer)
    return ["".join(document) for document in read()]


def load_text(
    name: str,
    *,
    field: str | None = None,
    evaluation: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> str:
    """All documents of a corpus, joined by blank lines, in memory."""
    return SEPARATOR.join(load_documents(name, field=field, evaluation=evaluation, tokenizer=tokenizer))


def record_text(record: Any, field: str | None, tokenizer: PreTrainedTokenizerBase | None, where: str) -> str:
    """Text of one record; empty where its text is null.

    Without a field, the first of these that is not null: `text`, chats in `messages` or `conversations`, `prompt` and
    `completion` (text, or messages), Alpaca's `instruction`, `input` and `output`.

    Raises:
        CalibrationError: no such field, or a field that is neither text nor a chat.
    """
    if isinstance(record, str):
        return _sound(record, where)
    if not isinstance(record, dict):
        raise CalibrationError(f"{where} is {kind_of(record)}, not an object with a text field")
    if field is not None:
        if field not in record:
            raise CalibrationError(f"{where} has no field {field!r}; it has {_names(record)}: choose with --field")
        value = record[field]
        text = chat_text(value, tokenizer, where) if is_chat(value) or value == [] else _text_of(record, field, where)
        return _sound(text, where)
    return _sound(_known_text(record, tokenizer, where), where)


def _known_text(record: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None, where: str) -> str:
    known = False
    if "text" in record:
        known = True
        if record["text"] is not None:
            return _text_of(record, "text", where)
    for name in ("messages", "conversations"):
        if name in record:
            known = True
            if record[name] is not None:
                if not isinstance(record[name], list):
                    raise CalibrationError(
                        f"{where}: field {name!r} is {kind_of(record[name])}, not a list of messages; choose with --field"
                    )
                return chat_text(record[name], tokenizer, where)
    if {"prompt", "completion"} <= record.keys():
        known = True
        prompt, completion = record["prompt"], record["completion"]
        if is_chat(prompt) or is_chat(completion):
            turns = [
                value if isinstance(value, list) else [{"role": role, "content": value}]
                for role, value in (("user", prompt), ("assistant", completion))
                if value is not None
            ]
            return chat_text([*chain(*turns)], tokenizer, where)
        if prompt is not None or completion is not None:
            return _text_of(record, "prompt", where) + _text_of(record, "completion", where)
    if {"instruction", "output"} <= record.keys():
        known = True
        parts = [_text_of(record, name, where) for name in ("instruction", "input", "output") if name in record]
        return "\n".join(part for part in parts if part)
    if known:
        return ""
    raise CalibrationError(
        f"{where} has no text, messages, conversations, prompt and completion, or instruction and output; it has {_names(record)}: choose with --field"
    )


def _text_of(record: dict[str, Any], field: str, where: str) -> str:
    """A field's text; empty where it is null."""
    value = record[field]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise CalibrationError(f"{where}: field {field!r} is {kind_of(value)}, not text; choose with --field")
    return value


def _sound(text: str, where: str) -> str:
    """A text that tokenizers can read."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CalibrationError(
            f"{where} holds \\u{ord(text[error.start]):04x}, half of a character (a lone surrogate), which is no text; remove the record, or put the whole character there"
        ) from error
    return text


def _names(record: dict[str, Any], most: int = 20) -> str:
    """Fields of a record, in a form that can be printed."""
    names = [str(name).encode("utf-8", "backslashreplace").decode() for name in islice(record, most)]
    return ", ".join([*names, "..."] if len(record) > most else names) or "none"


def _from_first_word(document: Document) -> Document | None:
    """The document again, or None where it is blank."""
    pieces, read = iter(document), []
    for piece in pieces:
        read.append(piece)
        if piece.strip():
            return chain(read, pieces)
    return None


def _written(
    records: Iterable[tuple[str, Any]], field: str | None, tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[Document]:
    for where, record in records:
        yield [record_text(record, field, tokenizer, where)]


def _file(name: str) -> Path | None:
    """The file that a name means; None for a hub corpus.

    Raises:
        CalibrationError: neither, both, or a file of another kind.
    """
    kinds = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
    if not str(name).strip():
        raise CalibrationError(f"the name of the text is empty; give a file ({kinds}) or {', '.join(HUB_CORPORA)}")
    path = Path(name)
    try:
        path = path.expanduser()
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError, RuntimeError) as error:
        if name in HUB_CORPORA:
            return None
        if name in (SELF, COPY):
            raise CalibrationError(
                f"{name} is made for calibration and healing; evaluation needs a text: a file, or {', '.join(HUB_CORPORA)}"
            ) from error
        raise CalibrationError(
            f"{name} is neither a file nor one of the named corpora ({', '.join((*HUB_CORPORA, SELF, COPY))})"
        ) from error
    except OSError as error:
        raise CalibrationError(f"{name} cannot be read: {error.strerror or error}") from error
    if stat.S_ISDIR(mode):
        if name in HUB_CORPORA:
            return None
        raise CalibrationError(f"{name} is a directory; give a file: {kinds}")
    if not stat.S_ISREG(mode):
        raise CalibrationError(
            f"{name} is a pipe or a device, and text may be read more than once; write it to a file: {kinds}"
        )
    if path.suffix.lower() not in SUFFIXES:
        if name in HUB_CORPORA:
            raise CalibrationError(
                f"{name} is one of the named corpora and also a file here, whose name does not say its format; rename the file ({kinds})"
            )
        raise CalibrationError(f"{name}: text files are {kinds}")
    return path


def _guarded(path: Path, items: Iterator[Any]) -> Iterator[Any]:
    """The items; what the system refuses on the way is said of the file."""
    try:
        yield from items
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror or error}") from error


def _file_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Records of a file, and where each is."""
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return _json_lines(path)
    if suffix == ".json":
        return _JsonReader(path).records()
    return _hub_dataset(str(path), "parquet", data_files=str(path), split="train")


def _read_text(path: Path) -> Iterator[str]:
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
        self.pieces = _read_text(path)
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


def _hub_records(name: str, evaluation: bool) -> Iterator[tuple[str, Any]]:
    corpus = HUB_CORPORA[name]
    split = corpus.evaluation_split if evaluation else corpus.calibration_split
    return _hub_dataset(
        name, corpus.path, name=corpus.name, split=split, streaming=corpus.streaming, revision=corpus.revision
    )


def _hub_dataset(corpus: str, path: str, **options: Any) -> Iterator[tuple[str, Any]]:
    """Records of a data set, and where each is."""
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(
            f"reading {corpus} needs the `datasets` package: pip install 'care-mla[data]'"
        ) from error
    try:
        for number, record in enumerate(datasets.load_dataset(path, **options), 1):
            yield f"{corpus}, record {number}", record
    except Exception as error:  # datasets raises dozens of unrelated types; all mean that there is no text
        raise CalibrationError(f"{corpus} cannot be loaded: {first_line(error)}") from error
