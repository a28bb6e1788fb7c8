"""Token windows of a text or of its documents: where they begin, and how they are filled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from care_mla.errors import CalibrationError
from care_mla.text.documents import Document, joined
from care_mla.text.tokens import all_tokens, first_tokens

EXACT_CHARACTERS = 1 << 25
"""Up to this length a text is tokenized whole, and windows begin at any of its tokens; of a longer one, at any of its characters."""
LEAD = 16
"""Tokens at both ends of a stretch of text that a cut within a word may have spoiled."""
STRETCH = 8
"""Characters read for each token of a stretch; more where that was too little."""


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


def text_windows(
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


def document_windows(
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


def padding_token(tokenizer: PreTrainedTokenizerBase, vocabulary: int | None) -> int:
    """A token to pad with that the model embeds; an added [PAD] often has no row, and which token it is does not matter."""
    pad = tokenizer.pad_token_id
    return pad if pad is not None and (vocabulary is None or pad < vocabulary) else 0


def _too_short(found: int, needed: int) -> CalibrationError:
    if not found:
        return CalibrationError(
            "the tokenizer makes no token of the calibration text; give the model its own tokenizer"
        )
    return CalibrationError(
        f"the calibration text has {found} tokens, one window needs more than {needed}; give more text or a smaller --seqlen"
    )
