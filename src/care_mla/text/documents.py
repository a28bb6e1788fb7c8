"""Documents of files and hub corpora, one by one and in pieces: what is not needed is not held."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from care_mla.errors import CalibrationError
from care_mla.text.fields import record_text
from care_mla.text.files import file_records, guarded, read_text
from care_mla.text.hub import HUB_CORPORA, hub_records
from care_mla.text.specs import COPY, SELF

MAX_DOCUMENTS = 5000
"""Documents taken from a streamed corpus for calibration or evaluation."""
SEPARATOR = "\n\n"
"""Between documents that are joined."""
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
    path = local_file(name)
    documents: Iterator[Document]
    if path is None:
        documents = _written(hub_records(name, evaluation), field or HUB_CORPORA[name].field, tokenizer)
    elif path.suffix.lower() == ".txt":
        documents = iter([guarded(path, read_text(path))])
    else:
        documents = _written(guarded(path, file_records(path)), field, tokenizer)
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

    if local_file(name) is None and HUB_CORPORA[name].streaming:
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


def local_file(name: str) -> Path | None:
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
