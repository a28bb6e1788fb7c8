"""Perplexity, mean KL to a reference and top-1 agreement over fixed windows of a text."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from care_mla.errors import CalibrationError, ConfigError
from care_mla.evaluation.cache import CacheUsage, measure_cache
from care_mla.progress import Track, silent
from care_mla.runtime import dtype_name
from care_mla.text.tokens import first_tokens, leading_bos, require_embedded


@dataclass(frozen=True)
class Evaluation:
    """Results on one text. Losses are means over predicted tokens, in nats.

    Attributes:
        loss: cross entropy of the model; perplexity = exp(loss).
        reference_loss, loss_increase, kl, top1_agreement: against the reference; None without one.
    """

    perplexity: float
    loss: float
    num_tokens: int
    seqlen: int
    windows: int
    cache: CacheUsage
    reference_perplexity: float | None = None
    reference_loss: float | None = None
    loss_increase: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    reference_cache: CacheUsage | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def require_windows(seqlen: int, windows: int) -> None:
    """
    Raises:
        ConfigError: no token would be predicted.
    """
    if seqlen < 2:
        raise ConfigError(f"--seqlen {seqlen} must be at least 2: a window predicts each token from those before it")
    if windows < 1:
        raise ConfigError(f"--windows {windows} must be at least 1")


def evaluation_windows(
    tokenizer: PreTrainedTokenizerBase,
    text: str | Iterable[str],
    *,
    seqlen: int,
    windows: int,
    vocabulary: int | None = None,
) -> Tensor:
    """The first non-overlapping windows of a text, [windows, seqlen].

    Args:
        text: whole, or in pieces, of which no more are read than the windows need.
        vocabulary: tokens that the model embeds; None: not checked.

    Raises:
        ConfigError: no token would be predicted.
        CalibrationError: text too short, or with tokens that the model does not know.
    """
    require_windows(seqlen, windows)
    bos = leading_bos(tokenizer)
    body = seqlen - (bos is not None)
    tokens, _ = first_tokens(tokenizer, [text] if isinstance(text, str) else text, windows * body)
    if not len(tokens):
        raise CalibrationError("the tokenizer makes no token of the evaluation text; give the model its own tokenizer")
    if len(tokens) < windows * body:
        raise CalibrationError(
            f"the evaluation text has {len(tokens)} tokens, {windows} windows of {seqlen} need {windows * body}; lower --windows or --seqlen"
        )
    rows = tokens.view(windows, body)
    rows = rows if bos is None else torch.cat([torch.full((windows, 1), bos), rows], dim=1)
    require_embedded(rows, tokenizer, vocabulary, "the evaluation text")
    return rows


@torch.no_grad()
def evaluate_model(
    model: PreTrainedModel, windows: Tensor, *, reference: PreTrainedModel | None = None, track: Track = silent
) -> Evaluation:
    """Evaluate on windows [count, seqlen], one at a time.

    Args:
        reference: the unconverted model, for the loss increase, KL(reference || model) and top-1 agreement.

    Raises:
        CalibrationError: a loss that is not finite.
    """
    loss = reference_loss = kl = agreement = 0.0
    for row in track(windows, "Evaluating", len(windows), unit="windows"):
        ids = row[None]
        targets = row[1:].to(model.device)
        logits = model(ids.to(model.device), use_cache=False).logits[0, :-1].float()
        loss += cross_entropy(logits, targets, reduction="sum").item()
        if reference is not None:
            expected = reference(ids.to(reference.device), use_cache=False).logits[0, :-1].float().to(model.device)
            reference_loss += cross_entropy(expected, targets, reduction="sum").item()
            kl += kl_div(logits.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="sum").item()
            agreement += (logits.argmax(-1) == expected.argmax(-1)).sum().item()
    count = windows.shape[0] * (windows.shape[1] - 1)
    mean = loss / count
    _require_finite(mean, "the model's loss", model)
    if reference is not None:
        _require_finite(reference_loss / count, "the reference's loss", reference)
        _require_finite(kl / count, "the KL of the two predictions", model)
    compared: dict[str, Any] = {}
    if reference is not None:
        compared = {
            "reference_perplexity": _perplexity(reference_loss / count),
            "reference_loss": reference_loss / count,
            "loss_increase": (loss - reference_loss) / count,
            "kl": kl / count,
            "top1_agreement": agreement / count,
            "reference_cache": measure_cache(reference, windows[:1]),
        }
    return Evaluation(
        perplexity=_perplexity(mean),
        loss=mean,
        num_tokens=count,
        seqlen=windows.shape[1],
        windows=windows.shape[0],
        cache=measure_cache(model, windows[:1]),
        **compared,
    )


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _require_finite(value: float, what: str, model: PreTrainedModel) -> None:
    """
    Raises:
        CalibrationError
    """
    if math.isfinite(value):
        return
    cure = (
        "its weights are damaged, or too large to compute with"
        if model.dtype == torch.float32
        else f"its weights are damaged, or its activations overflow in {dtype_name(model.dtype)}: try --dtype float32"
    )
    raise CalibrationError(f"{what} on this text is not finite; {cure}")
