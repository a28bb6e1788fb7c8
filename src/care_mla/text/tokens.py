"""Text to token ids, piece by piece: neither the text nor what a tokenizer makes of it is held whole."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

import care_mla.modeling  # noqa: F401  (registers the converted model's config)
from care_mla.errors import CalibrationError, CheckpointError
from care_mla.text.chat import first_line

BLOCK = 1 << 17
"""Characters that a tokenizer gets at once; it needs over a hundred bytes for each."""
OVERLAP = 2048
"""Characters that two blocks share, so that they can be joined where both are cut into the same tokens."""
AGREEING = 8
"""Tokens in a row that must agree there."""

TOKENIZER_FILES = ("tokenizer*", "*vocab*", "*.model", "*.tiktoken", "tekken.json")
"""Any of these may be one."""

_Token = tuple[int, int, int]
"""Begin and end in its block, id."""


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory.

    Raises:
        CheckpointError: none there, or one that knows no token.
    """
    if not any(found for pattern in TOKENIZER_FILES for found in directory.glob(pattern)):
        raise CheckpointError(
            f"{directory} has no tokenizer (tokenizer.json, tokenizer.model, vocab.json or the like); put the model's own there"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # files of many formats, each of whose readers raises its own types
        said = " ".join(str(error).split()) or "no reason given"
        raise CheckpointError(
            f"{directory} has no usable tokenizer, its files cannot be read: {type(error).__name__}: {said}"
        ) from error
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # what transformers makes where there is no vocabulary
        raise CheckpointError(
            f"{directory} has no usable tokenizer: it knows {len(tokenizer)} tokens, all of them special; put the model's tokenizer.json there"
        )
    return tokenizer


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Token ids [tokens], no special tokens."""
    return tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]


def token_stream(tokenizer: PreTrainedTokenizerBase, pieces: Iterable[str]) -> Iterator[list[int]]:
    """Token ids of a text that comes in pieces; the same as those of the whole text, without special tokens.

    Blocks of it overlap, and are joined at tokens that both have in the same place. A tokenizer that does not say which
    characters a token comes from gets blocks that end before white space instead.
    """
    blocks = _blocks(pieces)
    if not tokenizer.is_fast:
        yield from (tokenize(tokenizer, text).tolist() for text in _at_white_space(blocks))
        return
    text = next(blocks, "")
    tokens, begin = _encode(tokenizer, text), 0
    for block in blocks:
        shared = len(text) - OVERLAP  # where the next block begins in this one
        following = text[shared:] + block
        coming = _encode(tokenizer, following)
        joint = _joint(tokens, coming, shared, len(text))
        if joint is None:
            # Cut into other tokens over all that they share (a run of one letter, an unknown word of thousands): the next
            # block begins where a token of this one ends.
            last = next(
                (i for i in range(len(tokens), begin, -1) if tokens[i - 1][1] <= len(text) - OVERLAP // 4), None
            )
            end = len(tokens) if last is None else last
            following = (text[tokens[end - 1][1] :] if last is not None else "") + block
            coming, joint = _encode(tokenizer, following), (end, 0)
        yield [token[2] for token in tokens[begin : joint[0]]]
        text, tokens, begin = following, coming, joint[1]
    yield [token[2] for token in tokens[begin:]]


def all_tokens(tokenizer: PreTrainedTokenizerBase, pieces: Iterable[str]) -> Tensor:
    """Ids of all tokens [tokens], int32."""
    return _compact(token_stream(tokenizer, pieces))


def first_tokens(tokenizer: PreTrainedTokenizerBase, pieces: Iterable[str], count: int) -> tuple[Tensor, bool]:
    """The first `count` token ids of a text, or all it has, [tokens] int64; and whether these are all. No more is read."""
    stream = token_stream(tokenizer, pieces)
    found = array("i")
    for ids in stream:
        found.extend(ids)
        if len(found) > count:
            break
    return torch.tensor(found[:count], dtype=torch.long), len(found) <= count


def leading_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The BOS id where the tokenizer puts one before every text (Llama 3, Gemma), else None."""
    ids = tokenizer("a").input_ids
    return ids[0] if tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id] else None


def ordinary_tokens(tokenizer: PreTrainedTokenizerBase, vocabulary: int | None = None) -> Tensor:
    """Ids of all tokens but the special ones, below `vocabulary` where one is given."""
    size = len(tokenizer) if vocabulary is None else min(vocabulary, len(tokenizer))
    ordinary = torch.ones(size, dtype=torch.bool)
    ordinary[[i for i in tokenizer.all_special_ids if i < size]] = False
    return ordinary.nonzero()[:, 0]


def embedding_rows(directory: Path) -> int:
    """How many tokens the model of a directory has embeddings for, by its config.json.

    Raises:
        CheckpointError: a config.json that transformers cannot read.
    """
    try:
        return int(AutoConfig.from_pretrained(directory, trust_remote_code=False).get_text_config().vocab_size)
    except Exception as error:  # transformers checks configs by several libraries, each with its own types
        raise CheckpointError(f"{directory / 'config.json'} cannot be used: {first_line(error)}") from error


def require_embedded(ids: Tensor, tokenizer: PreTrainedTokenizerBase, rows: int | None, name: str) -> None:
    """Refuse token ids that the model has no embedding for.

    Args:
        rows: tokens with an embedding; None: not known here.
        name: of the text.

    Raises:
        CalibrationError
    """
    if rows is None or not ids.numel() or int(ids.max()) < rows:
        return
    highest = int(ids.max())
    raise CalibrationError(
        f"{name}: token {highest} ({tokenizer.convert_ids_to_tokens(highest)!r}) has no embedding: the tokenizer knows {len(tokenizer)} tokens, the model "
        f"embeds {rows}; give the model its own tokenizer, or a text without such tokens"
    )


def _blocks(pieces: Iterable[str]) -> Iterator[str]:
    """The same text in pieces of `BLOCK` characters; the last has the rest."""
    held: list[str] = []
    size = 0
    for piece in pieces:
        held.append(piece)
        size += len(piece)
        if size < BLOCK:
            continue
        text = "".join(held)
        whole = size - size % BLOCK
        yield from (text[start : start + BLOCK] for start in range(0, whole, BLOCK))
        held, size = [text[whole:]], size - whole
    if size:
        yield "".join(held)


def _at_white_space(blocks: Iterable[str]) -> Iterator[str]:
    """Blocks cut anew, before the last white space of each; at its end where it has none."""
    rest = ""
    for block in blocks:
        text = rest + block
        space = max(text.rfind(" "), text.rfind("\n"))
        end = space if space > 0 else len(text)
        yield text[:end]
        rest = text[end:]
    if rest:
        yield rest


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[_Token]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [(begin, end, id) for (begin, end), id in zip(encoded.offset_mapping, encoded.input_ids, strict=True)]


def _joint(tokens: list[_Token], coming: list[_Token], shared: int, length: int) -> tuple[int, int] | None:
    """Where two overlapping blocks can be joined: index of a token in each, from which on they agree.

    Args:
        shared: where the second block begins in the first.
        length: characters of the first.
    """
    margin = OVERLAP // 4  # at both ends, cuts may have made other tokens than the text has
    places = {(begin + shared, end + shared, id): i for i, (begin, end, id) in reversed([*enumerate(coming[:OVERLAP])])}
    first = next((i for i, token in enumerate(tokens) if token[0] >= shared + margin), len(tokens))
    for i in range(max(1, first), len(tokens) - AGREEING):
        if tokens[i][0] >= length - margin:
            return None
        j = places.get(tokens[i])
        # Tokens of one character (bytes of an emoji) stay together.
        if j is None or tokens[i - 1][0] == tokens[i][0]:
            continue
        run = [(begin + shared, end + shared, id) for begin, end, id in coming[j : j + AGREEING]]
        if run == tokens[i : i + AGREEING]:
            return i, j
    return None


def _compact(chunks: Iterable[list[int]]) -> Tensor:
    """Numbers in four bytes each, [count] int32."""
    held = array("i")
    for chunk in chunks:
        held.extend(chunk)
    return torch.frombuffer(held, dtype=torch.int32) if held else torch.zeros(0, dtype=torch.int32)
