"""Calibration samples: windows of text, of documents, of text sampled from the model, and mixes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from care_mla.calibration.documents import (
    HUB_CORPORA,
    MAX_DOCUMENTS,
    Document,
    corpus_reader,
    joined,
    load_documents,
    load_text,
    stream_documents,
)
from care_mla.calibration.sampling import copying_windows, sample_from_model
from care_mla.calibration.specs import COPY, SELF, CorpusPart, parse_spec, require_distinct, share
from care_mla.calibration.tokens import (
    all_tokens,
    first_tokens,
    leading_bos,
    load_tokenizer,
    ordinary_tokens,
    require_embedded,
    tokenize,
)
from care_mla.errors import CalibrationError, ConfigError
from care_mla.progress import Track, silent

__all__ = [
    "COPY",
    "HUB_CORPORA",
    "MAX_DOCUMENTS",
    "SELF",
    "Batch",
    "CorpusPart",
    "TokenWindows",
    "copying_windows",
    "leading_bos",
    "load_documents",
    "load_text",
    "load_tokenizer",
    "make_windows",
    "ordinary_tokens",
    "parse_spec",
    "random_windows",
    "sample_from_model",
    "share",
    "stream_documents",
    "tokenize",
]

EXACT_CHARACTERS = 1 << 25
"""Up to this length a text is tokenized whole, and windows begin at any of its tokens; of a longer one, at any of its characters."""
LEAD = 16
"""Tokens at both ends of a stretch of text that a cut within a word may have spoiled."""
STRETCH = 8
"""Characters read for each token of a stretch; more where that was too little."""


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
        notes: what the user should know of them.
    """

    input_ids: Tensor
    lengths: Tensor
    weights: Tensor
    notes: tuple[str, ...] = ()

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


def random_windows(tokens: Tensor, count: int, seqlen: int, seed: int, bos: int | None) -> Tensor:
    """`count` windows [count, seqlen] int64 at uniformly random starts; with a BOS each window begins with it.

    Raises:
        CalibrationError: fewer tokens than one window.
    """
    body = seqlen - (bos is not None)
    if len(tokens) <= body:
        raise _too_short(len(tokens), body)
    starts = torch.randint(0, len(tokens) - body, (count,), generator=torch.Generator().manual_seed(seed))
    windows = torch.stack([tokens[start : start + body] for start in starts.tolist()]).long()
    return windows if bos is None else torch.cat([torch.full((count, 1), bos), windows], dim=1)


def scattered_windows(
    tokenizer: PreTrainedTokenizerBase,
    read: Callable[[], Iterable[str]],
    size: int,
    count: int,
    seqlen: int,
    seed: int,
    bos: int | None,
) -> Tensor:
    """As `random_windows`, of a text that is too long to tokenize: starts are uniform over its characters.

    Args:
        read: the text in pieces, from its beginning with every call.
        size: its characters.

    Raises:
        CalibrationError: fewer tokens than one window.
    """
    body = seqlen - (bos is not None)
    width = min(size, STRETCH * (body + 2 * LEAD))
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, size - width + 1, (count,), generator=generator).tolist()
    rows: dict[int, Tensor] = {}
    while len(rows) < count:
        missing = [row for row in range(count) if row not in rows]
        begins = [max(0, min(starts[row], size - width)) for row in missing]
        for row, text in zip(missing, stretches(read(), begins, width), strict=True):
            ids, _ = first_tokens(tokenizer, [text], body + 2 * LEAD)
            if len(ids) == body + 2 * LEAD:
                rows[row] = ids[LEAD : LEAD + body]
            elif width == size:
                raise _too_short(len(ids), body + 2 * LEAD - 1)
        width = min(size, 4 * width)
    windows = torch.stack([rows[row] for row in range(count)])
    return windows if bos is None else torch.cat([torch.full((count, 1), bos), windows], dim=1)


def stretches(pieces: Iterable[str], begins: list[int], width: int) -> list[str]:
    """Characters [begin, begin + width) of a text in pieces, for each of `begins`; nothing else of it is held."""
    found: list[list[str]] = [[] for _ in begins]
    waiting = sorted(range(len(begins)), key=lambda i: -begins[i])  # the next one last
    open_: list[int] = []
    position = 0
    for piece in pieces:
        after = position + len(piece)
        while waiting and begins[waiting[-1]] < after:
            open_.append(waiting.pop())
        for i in open_:
            found[i].append(piece[max(0, begins[i] - position) : begins[i] + width - position])
        open_ = [i for i in open_ if begins[i] + width > after]
        position = after
        if not waiting and not open_:
            break
    return ["".join(parts) for parts in found]


def _too_short(found: int, needed: int) -> CalibrationError:
    if not found:
        return CalibrationError(
            "the tokenizer makes no token of the calibration text; give the model its own tokenizer"
        )
    return CalibrationError(
        f"the calibration text has {found} tokens, one window needs more than {needed}; give more text or a smaller --seqlen"
    )


def _text_windows(
    tokenizer: PreTrainedTokenizerBase,
    read: Callable[[], Iterator[Document]],
    count: int,
    seqlen: int,
    seed: int,
    bos: int | None,
) -> Tensor:
    """Windows [count, seqlen] of the joined documents."""
    size = sum(len(piece) for piece in joined(read()))
    if size > EXACT_CHARACTERS:
        return scattered_windows(tokenizer, lambda: joined(read()), size, count, seqlen, seed, bos)
    return random_windows(all_tokens(tokenizer, joined(read())), count, seqlen, seed, bos)


def _document_windows(
    tokenizer: PreTrainedTokenizerBase,
    read: Callable[[], Iterator[Document]],
    count: int,
    seqlen: int,
    seed: int,
    bos: int | None,
    pad: int,
) -> tuple[Tensor, Tensor]:
    """One window a document, cut or padded to seqlen; documents drawn without replacement. Returns windows and lengths.

    Raises:
        CalibrationError: no token in any of them.
    """
    total = sum(1 for _ in read())
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].tolist()
    row_of = {document: row for row, document in enumerate(order)}
    rows, lengths = torch.full((len(order), seqlen), pad), torch.zeros(len(order), dtype=torch.long)
    for document, pieces in enumerate(read()):
        if document not in row_of:
            continue
        ids, _ = first_tokens(tokenizer, pieces, seqlen)
        if not len(ids):
            continue
        if bos is not None and int(ids[0]) != bos:  # chat templates write it themselves
            ids = torch.cat([torch.tensor([bos]), ids])[:seqlen]
        rows[row_of[document], : len(ids)] = ids
        lengths[row_of[document]] = len(ids)
    if not bool(lengths.any()):
        raise _too_short(0, 1)
    return rows[lengths > 0], lengths[lengths > 0]


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
    vocabulary: int | None = None,
    track: Track = silent,
) -> TokenWindows:
    """Calibration samples of a SPEC.

    Args:
        spec: `NAME`, or a weighted mix `NAME:0.5,NAME:0.5`; NAME is a file, a hub corpus, `self` or `copy`.
        pack: windows at random positions of the joined text; otherwise one padded window a document.
        model: needed for `self`.
        vocabulary: tokens that the model embeds; None: not checked.

    Raises:
        ConfigError, CalibrationError: bad spec, missing or too short text, or tokens that the model does not know.

    Source: CARE App. I.7 for mixes, C_mix = sum_i pi_i C_i. Samples are shared out by weight and the token weights make
    the shares exact whatever the lengths of the samples.
    """
    if samples < 1 or seqlen < 2:
        raise ConfigError(f"--samples {samples} and --seqlen {seqlen} must be at least 1 and 2")
    parts = parse_spec(spec)
    if samples < len(parts):
        raise ConfigError(f"--samples {samples} is less than one for each of the {len(parts)} corpora of {spec!r}")
    require_distinct(parts, spec)
    bos = leading_bos(tokenizer)
    counts = share(samples, [part.weight for part in parts])
    windows, lengths, notes = [], [], []
    for index, (part, count) in enumerate(zip(parts, counts, strict=True)):
        part_seed = seed + index
        length = torch.full((count,), seqlen)
        if part.name == SELF:
            if model is None:
                raise ConfigError("calibration on `self` needs the model itself")
            rows = sample_from_model(model, tokenizer, count, seqlen, part_seed, track=track)
        elif part.name == COPY:
            rows = copying_windows(tokenizer, count, seqlen, part_seed, bos, vocabulary)
        else:
            read = corpus_reader(part.name, field=field, tokenizer=tokenizer)
            if pack:
                rows = _text_windows(tokenizer, read, count, seqlen, part_seed, bos)
            else:
                pad = _padding(tokenizer, vocabulary)
                rows, length = _document_windows(tokenizer, read, count, seqlen, part_seed, bos, pad)
                if len(rows) < count:
                    notes.append(
                        f"{part.name} gave {len(rows)} documents, fewer than the {count} windows asked of it; give more text, or windows of the joined text (--pack)"
                    )
        require_embedded(rows, tokenizer, vocabulary, part.name)
        windows.append(rows)
        lengths.append(length)
    total = sum(int(length.sum()) for length in lengths)
    weights = [
        torch.full((len(length),), part.weight * total / int(length.sum()), dtype=torch.float64)
        for part, length in zip(parts, lengths, strict=True)
    ]
    return TokenWindows(torch.cat(windows), torch.cat(lengths), torch.cat(weights), tuple(notes))


def _padding(tokenizer: PreTrainedTokenizerBase, vocabulary: int | None) -> int:
    """A token to pad with that the model embeds; an added [PAD] often has no row, and which token it is does not matter."""
    pad = tokenizer.pad_token_id
    return pad if pad is not None and (vocabulary is None or pad < vocabulary) else 0
