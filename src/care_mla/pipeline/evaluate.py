"""Evaluation of a model, and the report of a converted one."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from care_mla.checkpoint import locked, resolve_source
from care_mla.errors import ConfigError
from care_mla.files import read_json, write_json
from care_mla.pipeline.report import draw_report, saved_evaluations
from care_mla.progress import Track, shown
from care_mla.records.artifacts import EVALUATION, MANIFEST
from care_mla.runtime import dtype_name, memory_named, resolve_device, resolve_dtype

IDENTITY = ("text", "field", "seqlen", "windows", "reference", "dtype", "device")
"""What makes two evaluations of a model the same one: the later replaces the earlier."""


def evaluate(
    model: str | Path,
    text: str | Path,
    *,
    reference: str | Path | None = None,
    seqlen: int = 512,
    windows: int = 8,
    field: str | None = None,
    device: str | int | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    track: Track = shown,
) -> dict[str, Any]:
    """Evaluate a converted (or any) model on the first windows of a text.

    A converted model keeps the result beside its manifest, for the report; not where that is a hub cache or cannot be written.

    Args:
        text: a .txt, .json, .jsonl or .parquet file, or a named hub corpus.
        reference: the unconverted model.
        device, dtype: of the forward passes, see `runtime.resolve_device` and `runtime.resolve_dtype`.

    Returns:
        What is kept, and `notes`: what the user should know though nothing failed.

    Raises:
        ConversionError
    """
    from care_mla.evaluation import evaluate_model, evaluation_windows, require_windows
    from care_mla.modeling import load, require_loadable
    from care_mla.text import embedding_rows, joined, load_tokenizer, stream_documents

    where, precision = resolve_device(device), resolve_dtype(dtype)
    require_windows(seqlen, windows)
    directory = resolve_source(model)
    require_loadable(directory)  # before its tokenizer, which reads config.json too
    converted = (directory / MANIFEST).is_file()
    if converted:
        saved_evaluations(directory)  # damaged ones are refused before the work
    tokenizer = load_tokenizer(directory)
    if reference is not None:
        _require_same_vocabulary(directory, resolve_source(reference), model, reference)
    pieces = joined(stream_documents(str(text), field=field, evaluation=True, tokenizer=tokenizer))
    rows = evaluation_windows(tokenizer, pieces, seqlen=seqlen, windows=windows, vocabulary=embedding_rows(directory))
    evaluated = load(directory, dtype=precision, device=where)
    original = load(reference, dtype=precision, device=where) if reference is not None else None
    lower = f"lower --seqlen (now {seqlen}), or choose another --device or a smaller --dtype"
    with memory_named("the model was evaluated", where, lower):
        measured = evaluate_model(evaluated, rows, reference=original, track=track)
    result = {
        "text": str(text),
        "field": field,
        "reference": None if reference is None else str(reference),
        "dtype": dtype_name(evaluated.dtype),
        "device": where.type,
        **({} if original is None else {"reference_dtype": dtype_name(original.dtype)}),
        **measured.to_dict(),
    }
    if not converted:
        return {**result, "notes": []}
    unkept = _why_not_kept(directory)
    if unkept is not None:
        return {**result, "notes": [f"the result is not kept in {directory}: {unkept}"]}
    with locked(directory):
        kept = [e for e in saved_evaluations(directory) if not _is_same(e, result)]
        write_json(directory / EVALUATION, {"evaluations": [*kept, result]})
        draw_report(directory)
    return {**result, "notes": []}


def _is_same(earlier: dict[str, Any], result: dict[str, Any]) -> bool:
    """Whether an evaluation was the same one; those of earlier versions say less, and are compared by what they say."""
    alike = all(earlier[key] == result[key] for key in IDENTITY if key in earlier)
    return alike and (earlier["reference_loss"] is None) == (result["reference_loss"] is None)


def _why_not_kept(directory: Path) -> str | None:
    """Why nothing may be written into a converted model; None where it may."""
    for path in (directory.absolute(), directory.resolve()):
        parts = path.parts
        if any(a.startswith("models--") and b in ("snapshots", "blobs") for a, b in pairwise(parts)):
            return "it is in the cache of the Hugging Face hub, whose files are shared; --json keeps it elsewhere"
    if not os.access(directory, os.W_OK):
        return "it cannot be written; --json keeps it elsewhere"
    return None


def _require_same_vocabulary(directory: Path, other: Path, model: str | Path, reference: str | Path) -> None:
    """Refuse a reference whose tokens are others, before weights are read.

    Raises:
        ConfigError
    """
    from care_mla.text import load_tokenizer

    mine, theirs = (_vocabulary(read_json(path / "config.json")) for path in (directory, other))
    must = "it must be the model that was converted, or one with its tokenizer"
    if mine != theirs and None not in (mine, theirs):
        raise ConfigError(
            f"--reference {reference} has another vocabulary than {model} ({theirs} tokens, not {mine}); {must}"
        )
    if not any((other / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return  # weights alone: there is no tokenizer to differ
    if load_tokenizer(directory).get_vocab() != load_tokenizer(other).get_vocab():
        raise ConfigError(
            f"--reference {reference} has another tokenizer than {model}: the same ids mean other tokens there; {must}"
        )


def _vocabulary(config: dict[str, Any]) -> Any:
    """vocab_size of a config.json, of its text model if there are several; None where it leaves that to the class."""
    text = config.get("text_config")
    return (text if isinstance(text, dict) else config).get("vocab_size")
