"""Text for calibration and evaluation: hub data sets by name, local files, text sampled from the model, and mixes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from care_mla.errors import CalibrationError, CheckpointError, ConfigError
from care_mla.modeling import CACHE_NAME, cache_of
from care_mla.progress import Track, silent


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
SELF = "self"
COPY = "copy"
"""Random tokens said twice. Ordinary text hardly shows how a model copies, and what it does not show, a conversion drops."""


@dataclass(frozen=True)
class CorpusPart:
    """One term of a calibration SPEC."""

    name: str
    weight: float


def parse_spec(spec: str) -> list[CorpusPart]:
    """`alpaca:0.5,notes.jsonl:0.5` -> parts with weights that sum to one; a part without a weight counts 1.

    Raises:
        ConfigError: an empty part, or a weight that is not positive.
    """
    parts = []
    for term in (term.strip() for term in spec.split(",")):
        name, colon, tail = term.rpartition(":")
        try:
            weight = float(tail) if colon else 1.0
        except ValueError:  # a colon of the path
            colon, weight = "", 1.0
        name = name if colon else term
        if not name or not weight > 0:
            raise ConfigError(f"calibration {spec!r}: {term!r} is not NAME or NAME:WEIGHT with a positive weight")
        parts.append(CorpusPart(name, weight))
    total = sum(part.weight for part in parts)
    return [CorpusPart(part.name, part.weight / total) for part in parts]


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory.

    Raises:
        CheckpointError: none there.
    """
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{directory} has no usable tokenizer: {str(error).strip().splitlines()[0]}") from error


def _record_text(record: Any, field: str | None, where: str) -> str:
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        raise CalibrationError(f"{where}: a record is a {type(record).__name__}, not an object with a text field")
    if field is not None:
        if field not in record:
            raise CalibrationError(
                f"{where} has no field {field!r}; it has {', '.join(map(str, record))}: choose with --field"
            )
        return str(record[field])
    if "text" in record:
        return str(record["text"])
    if "instruction" in record and "output" in record:
        parts = (record["instruction"], record.get("input", ""), record["output"])
        return "\n".join(str(part) for part in parts if part)
    raise CalibrationError(
        f"{where} has neither a 'text' field nor instruction/output; it has {', '.join(map(str, record))}: choose with --field"
    )


def _read_records(path: Path) -> list[Any]:
    try:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if path.suffix == ".json":
            value = json.loads(path.read_text(encoding="utf-8"))
            return value if isinstance(value, list) else [value]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path} is not valid {path.suffix[1:].upper()}: {error}") from error
    raise CalibrationError(f"{path}: text files are .txt, .json, .jsonl or .parquet")


def stream_documents(name: str, *, field: str | None = None, evaluation: bool = False) -> Iterator[str]:
    """Documents of a local file or of a named hub corpus, one by one; blank ones are left out. A .txt file is one document.

    Raises:
        CalibrationError: missing, unreadable or empty.
    """
    path = Path(name).expanduser()
    documents: Iterable[str]
    if path.suffix == ".txt" and path.is_file():
        try:
            documents = [path.read_text(encoding="utf-8")]
        except UnicodeDecodeError as error:
            raise CalibrationError(f"{path} is not UTF-8 text: {error}") from error
    elif path.suffix == ".parquet" and path.is_file():
        records = _hub_dataset("parquet", data_files=str(path), split="train")
        documents = (_record_text(record, field, name) for record in records)
    elif path.is_file():
        documents = (_record_text(record, field, name) for record in _read_records(path))
    elif name in HUB_CORPORA:
        corpus = HUB_CORPORA[name]
        split = corpus.evaluation_split if evaluation else corpus.calibration_split
        records = _hub_dataset(
            corpus.path, name=corpus.name, split=split, streaming=corpus.streaming, revision=corpus.revision
        )
        documents = (_record_text(record, field or corpus.field, name) for record in records)
    else:
        raise CalibrationError(
            f"{name} is neither a file nor one of the named corpora ({', '.join(HUB_CORPORA)}, {SELF})"
        )
    empty = True
    for text in documents:
        if text.strip():
            empty = False
            yield text
    if empty:
        raise CalibrationError(f"{name} holds no text")


def load_documents(name: str, *, field: str | None = None, evaluation: bool = False) -> list[str]:
    """As `stream_documents`, in memory; of a streamed corpus the first `MAX_DOCUMENTS`.

    Raises:
        CalibrationError: missing, unreadable or empty.
    """
    documents = stream_documents(name, field=field, evaluation=evaluation)
    streamed = name in HUB_CORPORA and HUB_CORPORA[name].streaming and not Path(name).expanduser().is_file()
    return list(islice(documents, MAX_DOCUMENTS if streamed else None))


def _hub_dataset(path: str, **options: Any) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(f"reading {path} needs the `datasets` package: pip install 'care-mla[data]'") from error
    try:
        return datasets.load_dataset(path, **options)
    except Exception as error:  # datasets raises dozens of unrelated types; all mean that there is no text
        raise CalibrationError(f"data set {path} cannot be loaded: {str(error).strip().splitlines()[0]}") from error


def load_text(name: str, *, field: str | None = None, evaluation: bool = False) -> str:
    """All documents of a corpus, joined by blank lines."""
    return "\n\n".join(load_documents(name, field=field, evaluation=evaluation))


@dataclass(frozen=True)
class Batch:
    """Tokens ready for a forward pass.

    Attributes:
        input_ids: [batch, seqlen].
        attention_mask: [batch, seqlen], 0 on padding.
        token_weight: [batch, seqlen] float, the token's weight in the statistics; 0 on padding.
    """

    input_ids: Tensor
    attention_mask: Tensor
    token_weight: Tensor

    @property
    def is_full(self) -> bool:
        """No padding."""
        return bool(self.attention_mask.all())

    def mask_or_none(self, device: torch.device) -> Tensor | None:
        """The attention mask, or None where it would mask nothing."""
        return None if self.is_full else self.attention_mask.to(device)


@dataclass(frozen=True)
class TokenWindows:
    """All calibration samples of a run.

    Attributes:
        input_ids: [samples, seqlen]; padding on the right.
        lengths: [samples] tokens that count.
        weights: [samples] weight of each token of a sample (1 for a single corpus).
    """

    input_ids: Tensor
    lengths: Tensor
    weights: Tensor

    @property
    def num_tokens(self) -> int:
        """Tokens that count."""
        return int(self.lengths.sum())

    def __len__(self) -> int:
        return len(self.input_ids)

    def thinned(self, max_tokens: int) -> TokenWindows:
        """Evenly spaced windows, so that every part of a mix stays in, of at most `max_tokens` positions (one at least)."""
        count = min(len(self), max(1, max_tokens // self.input_ids.shape[1]))
        rows = torch.linspace(0, len(self) - 1, count).round().long()
        return TokenWindows(self.input_ids[rows], self.lengths[rows], self.weights[rows])

    def to_tensors(self) -> dict[str, Tensor]:
        """Named tensors for safetensors."""
        return {"input_ids": self.input_ids.to(torch.int32), "lengths": self.lengths, "weights": self.weights}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> TokenWindows:
        """Inverse of `to_tensors`."""
        return cls(tensors["input_ids"].long(), tensors["lengths"], tensors["weights"])

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """In order, the last one possibly smaller."""
        for start in range(0, len(self), batch_size):
            rows = slice(start, start + batch_size)
            mask = (torch.arange(self.input_ids.shape[1])[None] < self.lengths[rows, None]).long()
            yield Batch(self.input_ids[rows], mask, mask * self.weights[rows, None])


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Token ids [tokens], no special tokens."""
    return tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]


def leading_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The BOS id where the tokenizer puts one before every text (Llama 3, Gemma), else None."""
    ids = tokenizer("a").input_ids
    return ids[0] if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id else None


def random_windows(tokens: Tensor, count: int, seqlen: int, seed: int, bos: int | None) -> Tensor:
    """`count` windows [count, seqlen] at uniformly random starts; with a BOS each window begins with it.

    Raises:
        CalibrationError: fewer tokens than one window.
    """
    body = seqlen - (bos is not None)
    if len(tokens) <= body:
        raise CalibrationError(
            f"the calibration text has {len(tokens)} tokens, one window needs more than {body}; give more text or a smaller --seqlen"
        )
    starts = torch.randint(0, len(tokens) - body, (count,), generator=torch.Generator().manual_seed(seed))
    windows = torch.stack([tokens[start : start + body] for start in starts.tolist()])
    return windows if bos is None else torch.cat([torch.full((count, 1), bos), windows], dim=1)


def _document_windows(
    tokenizer: PreTrainedTokenizerBase, documents: list[str], count: int, seqlen: int, seed: int, bos: int | None
) -> tuple[Tensor, Tensor]:
    """One window a document, cut or padded to seqlen; documents drawn without replacement. Returns windows and lengths."""
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()[:count]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    rows, lengths = torch.full((len(order), seqlen), pad), torch.zeros(len(order), dtype=torch.long)
    for row, document in enumerate(order):
        ids = tokenize(tokenizer, documents[document])
        ids = (ids if bos is None else torch.cat([torch.tensor([bos]), ids]))[:seqlen]
        rows[row, : len(ids)] = ids
        lengths[row] = len(ids)
    return rows, lengths


def ordinary_tokens(tokenizer: PreTrainedTokenizerBase, vocabulary: int | None = None) -> Tensor:
    """Ids of all tokens but the special ones, below `vocabulary` where one is given."""
    size = len(tokenizer) if vocabulary is None else min(vocabulary, len(tokenizer))
    ordinary = torch.ones(size, dtype=torch.bool)
    ordinary[[i for i in tokenizer.all_special_ids if i < size]] = False
    return ordinary.nonzero()[:, 0]


def copying_windows(tokenizer: PreTrainedTokenizerBase, count: int, seqlen: int, seed: int, bos: int | None) -> Tensor:
    """[count, seqlen], each a string of random ordinary tokens and the same string again."""
    choices, body = ordinary_tokens(tokenizer), seqlen - (bos is not None)
    drawn = torch.randint(0, len(choices), (count, -(-body // 2)), generator=torch.Generator().manual_seed(seed))
    windows = choices[drawn].repeat(1, 2)[:, :body]
    return windows if bos is None else torch.cat([torch.full((count, 1), bos), windows], dim=1)


@torch.no_grad()
def sample_from_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    seqlen: int,
    seed: int,
    *,
    batch_size: int = 32,
    track: Track = silent,
) -> Tensor:
    """Text sampled from the model itself at temperature 1, [count, seqlen]: calibration without data.

    Each sample starts from BOS where the tokenizer writes one, otherwise from a random ordinary token; end-of-text
    tokens are never drawn, so that every window is full.
    """
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    special = torch.tensor(sorted({i for i in tokenizer.all_special_ids if i < vocabulary}), dtype=torch.long)
    choices = ordinary_tokens(tokenizer, vocabulary)
    bos = leading_bos(tokenizer)
    samples = []
    for start in track(range(0, count, batch_size), "Sampling text from the model", -(-count // batch_size)):
        rows = min(batch_size, count - start)
        first = choices[torch.randint(0, len(choices), (rows, 1), generator=generator)]
        ids = first if bos is None else torch.full((rows, 1), bos)
        past, step = None, ids.to(model.device)
        while ids.shape[1] < seqlen:
            output = model(step, **{CACHE_NAME: past}, use_cache=True, logits_to_keep=1)
            past = cache_of(output)
            logits = output.logits[:, -1].float().cpu()
            logits[:, special] = -torch.inf
            drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            ids = torch.cat([ids, drawn], dim=1)
            step = drawn.to(model.device)
        samples.append(ids)
    return torch.cat(samples)


def make_windows(
    spec: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    seqlen: int,
    seed: int,
    field: str | None = None,
    pack: bool = True,
    model: PreTrainedModel | None = None,
    track: Track = silent,
) -> TokenWindows:
    """Calibration samples of a SPEC.

    Args:
        spec: `NAME`, or a weighted mix `NAME:0.5,NAME:0.5`; NAME is a file, a hub corpus, `self` or `copy`.
        pack: windows at random positions of the joined text; otherwise one padded window a document.
        model: needed for `self`.

    Raises:
        ConfigError, CalibrationError: bad spec, missing or too short text.

    Source: CARE App. I.7 for mixes, C_mix = sum_i pi_i C_i. Samples are shared out by weight and the token weights make
    the shares exact whatever the lengths of the samples.
    """
    if samples < 1 or seqlen < 2:
        raise ConfigError(f"--samples {samples} and --seqlen {seqlen} must be at least 1 and 2")
    parts = parse_spec(spec)
    if samples < len(parts):
        raise ConfigError(f"--samples {samples} is less than one for each of the {len(parts)} corpora of {spec!r}")
    bos = leading_bos(tokenizer)
    counts = share(samples, [part.weight for part in parts])
    windows, lengths = [], []
    for index, (part, count) in enumerate(zip(parts, counts, strict=True)):
        if part.name == SELF:
            if model is None:
                raise ConfigError("calibration on `self` needs the model itself")
            rows = sample_from_model(model, tokenizer, count, seqlen, seed + index, track=track)
            length = torch.full((count,), seqlen)
        elif part.name == COPY:
            rows = copying_windows(tokenizer, count, seqlen, seed + index, bos)
            length = torch.full((count,), seqlen)
        elif pack:
            tokens = tokenize(tokenizer, load_text(part.name, field=field))
            rows = random_windows(tokens, count, seqlen, seed + index, bos)
            length = torch.full((count,), seqlen)
        else:
            rows, length = _document_windows(
                tokenizer, load_documents(part.name, field=field), count, seqlen, seed + index, bos
            )
        windows.append(rows)
        lengths.append(length)
    total = sum(int(length.sum()) for length in lengths)
    weights = [
        torch.full((len(length),), part.weight * total / int(length.sum()), dtype=torch.float64)
        for part, length in zip(parts, lengths, strict=True)
    ]
    return TokenWindows(torch.cat(windows), torch.cat(lengths), torch.cat(weights))


def share(total: int, weights: list[float]) -> list[int]:
    """Split a count by weights, at least one each (largest remainder)."""
    counts = [max(1, int(total * weight)) for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda i: counts[i] - total * weights[i])
    for i in range(max(0, total - sum(counts))):
        counts[by_remainder[i % len(counts)]] += 1
    return counts
