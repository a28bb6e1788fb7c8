"""Named corpora of the hub, and data sets that `datasets` reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from care_mla.errors import CalibrationError
from care_mla.text.chat import first_line


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


def hub_records(name: str, evaluation: bool) -> Iterator[tuple[str, Any]]:
    corpus = HUB_CORPORA[name]
    split = corpus.evaluation_split if evaluation else corpus.calibration_split
    return hub_dataset(
        name, corpus.path, name=corpus.name, split=split, streaming=corpus.streaming, revision=corpus.revision
    )


def hub_dataset(corpus: str, path: str, **options: Any) -> Iterator[tuple[str, Any]]:
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
