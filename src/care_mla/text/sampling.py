"""Text that needs no data: sampled from the model itself, or random strings said twice."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from care_mla.errors import CalibrationError
from care_mla.modeling import CACHE_NAME, cache_of
from care_mla.progress import Track, silent
from care_mla.text.tokens import leading_bos, ordinary_tokens, require_embedded


def copying_windows(
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    seqlen: int,
    seed: int,
    bos: int | None,
    vocabulary: int | None = None,
) -> Tensor:
    """[count, seqlen], each a string of random ordinary tokens and the same string again.

    Args:
        vocabulary: tokens that the model embeds; None: all.

    Raises:
        CalibrationError: no token to draw from.
    """
    choices, body = _choices(tokenizer, vocabulary), seqlen - (bos is not None)
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

    Raises:
        CalibrationError: no token to begin with, or a model that predicts none.
    """
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    special = torch.tensor(sorted({i for i in tokenizer.all_special_ids if i < vocabulary}), dtype=torch.long)
    choices = _choices(tokenizer, vocabulary)
    bos = leading_bos(tokenizer)
    if bos is not None:
        require_embedded(torch.tensor([bos]), tokenizer, vocabulary, "text sampled from the model")
    samples = []
    sizes = [min(batch_size, count - start) for start in range(0, count, batch_size)]
    steps = ((rows, position) for rows in sizes for position in range(seqlen))
    ids, past, step = torch.empty(0, 0, dtype=torch.long), None, torch.empty(0)
    for rows, position in track(
        steps, "Sampling from the model", count * seqlen, unit="tokens", size=lambda step: step[0]
    ):
        if position == 0:
            first = choices[torch.randint(0, len(choices), (rows, 1), generator=generator)]
            ids = first if bos is None else torch.full((rows, 1), bos)
            past, step = None, ids.to(model.device)
        else:
            output = model(step, **{CACHE_NAME: past}, use_cache=True, logits_to_keep=1)
            past = cache_of(output)
            logits = output.logits[:, -1].float().cpu()
            logits[:, special] = -torch.inf
            probabilities = logits.softmax(-1)
            if not bool(probabilities.isfinite().all()):
                raise CalibrationError(_why_not_finite(model))
            drawn = torch.multinomial(probabilities, 1, generator=generator)
            ids = torch.cat([ids, drawn], dim=1)
            step = drawn.to(model.device)
        if position == seqlen - 1:
            samples.append(ids)
    return torch.cat(samples)


def _choices(tokenizer: PreTrainedTokenizerBase, vocabulary: int | None) -> Tensor:
    """Tokens to draw from, [tokens].

    Raises:
        CalibrationError: none.
    """
    choices = ordinary_tokens(tokenizer, vocabulary)
    if not len(choices):
        limit = "" if vocabulary is None else f" below the {vocabulary} that the model embeds"
        raise CalibrationError(f"the tokenizer has no ordinary token{limit}; give the model its own tokenizer")
    return choices


def _why_not_finite(model: PreTrainedModel) -> str:
    """The reason for which a model predicts no token."""
    dtype = str(model.dtype).removeprefix("torch.")
    damaged = "the checkpoint is damaged, fetch it again"
    cause = damaged if dtype == "float32" else f"{dtype} is too narrow for it (try --dtype float32), or {damaged}"
    for name, weight in model.named_parameters():
        if not bool(weight.isfinite().all()):
            return f"the model predicts nothing, as {name} is not finite in {dtype}: {cause}"
    return f"the model predicts nothing, as its logits are not finite in {dtype} though its weights are: {cause}"
