"""Devices, precisions and evaluations that cannot be had."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file, save_file

from refusals import CALIBRATE, CONVERT, Place, Refusal

KIND = "Devices and precision"
WEIGHTS = "Weights that are zero"
EVALUATION = "Evaluation"
EVAL = ("eval", "SOURCE", "--text", "TEXT", "--seqlen", "32", "--windows", "2")


def _change(place: Place, name: str, value: float) -> None:
    path = place.source / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = torch.full_like(tensors[name], value)
    save_file(tensors, path, metadata={"format": "pt"})


def _zero_keys(place: Place) -> None:
    _change(place, "model.layers.1.self_attn.k_proj.weight", 0.0)


def _zero_outputs(place: Place) -> None:
    _change(place, "model.layers.1.self_attn.o_proj.weight", 0.0)


def _another_tokenizer(place: Place) -> None:
    """A reference in WORK/other whose tokens are named otherwise."""
    other = place.directory / "other"
    other.mkdir()
    for path in place.source.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")


def _another_vocabulary(place: Place) -> None:
    _another_tokenizer(place)
    config = json.loads((place.directory / "other" / "config.json").read_text(encoding="utf-8"))
    (place.directory / "other" / "config.json").write_text(json.dumps({**config, "vocab_size": 999}), encoding="utf-8")


def _few_embeddings(place: Place) -> None:
    path = place.source / "model.safetensors"
    tensors = load_file(path)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:50].contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((place.source / "config.json").read_text(encoding="utf-8"))
    (place.source / "config.json").write_text(json.dumps({**config, "vocab_size": 50}), encoding="utf-8")


CASES = [
    Refusal(KIND, "a word that is no device", (*CONVERT, "--device", "tpu"), "a device is cpu, cuda, xpu, mps"),
    Refusal(KIND, "a device without data", (*EVAL, "--device", "meta"), "a device is cpu, cuda, xpu, mps"),
    Refusal(KIND, "a second CPU", (*EVAL, "--device", "cpu:1"), "there is one cpu"),
    Refusal(KIND, "no device", (*EVAL, "--device", ""), "a device is cpu, cuda, xpu, mps"),
    Refusal(
        KIND,
        "healing on a word that is no device",
        ("heal", "SOURCE", "--out", "OUT", "--device", "tpu"),
        "a device is cpu, cuda, xpu, mps",
    ),
    Refusal(KIND, "double precision", (*CALIBRATE, "--dtype", "float64"), "models run in float32 at most"),
    Refusal(KIND, "an integer dtype", (*EVAL, "--dtype", "int8"), "run and written unquantized"),
    Refusal(KIND, "a word that is no dtype", (*CONVERT, "--dtype", "brain"), "unknown; choose float32"),
    Refusal(
        KIND,
        "training in float16",
        ("heal", "SOURCE", "--out", "OUT", "--precision", "fp16"),
        "training runs in float32 or bfloat16",
    ),
    Refusal(
        WEIGHTS,
        "keys",
        (*CONVERT, "--method", "care"),
        "layer 1: model.layers.1.self_attn.k_proj.weight is all zero",
        _zero_keys,
    ),
    Refusal(
        WEIGHTS,
        "the output projection, method fisher",
        CONVERT,
        "layer 1: model.layers.1.self_attn.o_proj.weight is all zero: no gradient reaches",
        _zero_outputs,
    ),
    Refusal(EVALUATION, "a window of one token", (*EVAL, "--seqlen", "1"), "--seqlen 1 must be at least 2"),
    Refusal(EVALUATION, "no window", (*EVAL, "--windows", "0"), "--windows 0 must be at least 1"),
    Refusal(EVALUATION, "a text too short", (*EVAL, "--windows", "100000"), "lower --windows or --seqlen"),
    Refusal(
        EVALUATION,
        "a reference with another tokenizer",
        (*EVAL, "--reference", "WORK/other"),
        "another tokenizer",
        _another_tokenizer,
    ),
    Refusal(
        EVALUATION,
        "a reference with another vocabulary",
        (*EVAL, "--reference", "WORK/other"),
        "another vocabulary",
        _another_vocabulary,
    ),
    Refusal(
        EVALUATION,
        "a tokenizer larger than the embedding",
        EVAL,
        "has no embedding",
        _few_embeddings,
    ),
]
