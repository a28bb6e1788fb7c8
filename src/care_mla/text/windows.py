"""Calibration samples: windows of text, of documents, of text sampled from the model, and mixes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from care_mla.errors import ConfigError
from care_mla.progress import Track, silent
from care_mla.runtime import Batch
from care_mla.text.documents import corpus_reader
from care_mla.text.packing import document_windows, padding_token, text_windows
from care_mla.text.sampling import copying_windows, sample_from_model
from care_mla.text.specs import COPY, SELF, parse_spec, require_distinct, share
from care_mla.text.tokens import leading_bos, require_embedded


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
                rows = text_windows(tokenizer, read, count, seqlen, part_seed, bos)
            else:
                pad = padding_token(tokenizer, vocabulary)
                rows, length = document_windows(tokenizer, read, count, seqlen, part_seed, bos, pad)
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
