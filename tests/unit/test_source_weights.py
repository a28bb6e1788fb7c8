"""A source is what transformers loads of its directory: the same files, names and precision."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import care_mla
from care_mla.checkpoint import CheckpointReader
from care_mla.pipeline.source import open_source


def _shard(directory: Path) -> dict[str, Tensor]:
    """Split model.safetensors in two; returns the tensors."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    index: dict[str, Any] = {"metadata": {"total_size": 1}, "weight_map": {}}
    for number in (1, 2):
        part = {name: tensors[name] for name in sorted(tensors)[number - 1 :: 2]}
        save_file(part, directory / f"model-0000{number}-of-00002.safetensors", {"format": "pt"})
        index["weight_map"].update(dict.fromkeys(part, f"model-0000{number}-of-00002.safetensors"))
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def _edit(directory: Path, **entries: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def _same_as_transformers(directory: Path) -> None:
    source = open_source(directory)
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, use_safetensors=True).state_dict()
    for layer in range(source.geometry.num_layers):
        for projection in ("q", "k", "v", "o"):
            name = f"{source.family.attention_name(layer)}.{projection}_proj.weight"
            assert torch.equal(source.projection(layer, projection)[0].float(), loaded[name]), name  # type: ignore[arg-type]


def test_a_file_of_all_weights_goes_before_an_index(tiny: Callable[..., Path]) -> None:
    directory = tiny()
    tensors = _shard(directory)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, directory / "model.safetensors", {"format": "pt"})
    _same_as_transformers(directory)


def test_shards_are_read_beyond_their_index(tiny: Callable[..., Path]) -> None:
    directory = tiny()
    _shard(directory)
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["model.layers.1.self_attn.k_proj.weight"]
    path.write_text(json.dumps(index))
    _same_as_transformers(directory)


def test_a_file_that_config_names(tiny: Callable[..., Path]) -> None:
    directory = tiny()
    tensors = load_file(directory / "model.safetensors")
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, directory / "other.safetensors", {"format": "pt"})
    _edit(directory, transformers_weights="other.safetensors")
    _same_as_transformers(directory)


@pytest.mark.parametrize("written", ["base model", "prefix on everything", "prefix on the head"])
def test_prefixes_that_transformers_adds_or_takes_away(
    tiny: Callable[..., Path], tmp_path: Path, text_file: Path, written: str
) -> None:
    directory = tiny(tie_word_embeddings=written == "base model")
    path = directory / "model.safetensors"
    tensors = load_file(path)
    if written == "base model":
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    elif written == "prefix on the head":
        tensors["model.lm_head.weight"] = tensors.pop("lm_head.weight")
    else:
        tensors = {f"model.{name}": tensor for name, tensor in tensors.items()}
    save_file(tensors, path, {"format": "pt"})
    _same_as_transformers(directory)
    out = tmp_path / "converted"
    text = {"calibration": str(text_file), "samples": 2, "seqlen": 16}
    care_mla.convert(directory, out, method="svd", ranks="uniform", rank=32, calibration=text)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(directory)(ids, use_cache=False).logits
        found = care_mla.load(out)(ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_what_transformers_leaves_alone_is_not_carried_over(tiny: Callable[..., Path]) -> None:
    directory = tiny()
    path = directory / "model.safetensors"
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.layers.3.self_attn.k_proj.weight": torch.ones(32, 48),
        "value_head.weight": torch.ones(1, 48),
    }
    tensors = load_file(path)
    save_file({**tensors, **extra}, path, {"format": "pt"})
    reader = open_source(directory).reader
    assert set(reader.names) == set(tensors)
    assert reader.fingerprint == CheckpointReader(directory).fingerprint


@pytest.mark.parametrize("said, kept", [("bfloat16", "bfloat16"), ("float64", "float64"), (None, "float16")])
def test_auto_is_the_precision_that_transformers_loads(
    tiny: Callable[..., Path], tmp_path: Path, text_file: Path, said: str | None, kept: str
) -> None:
    directory = tiny()
    path = directory / "model.safetensors"
    tensors = {name: tensor.half() for name, tensor in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    _edit(directory, dtype=said)
    assert open_source(directory).dtype == getattr(torch, kept)
    text = {"calibration": str(text_file), "samples": 2, "seqlen": 16}
    care_mla.convert(directory, tmp_path / "out", method="svd", ranks="uniform", rank=8, calibration=text)
    assert care_mla.load(tmp_path / "out").dtype == AutoModelForCausalLM.from_pretrained(directory).dtype


@pytest.mark.parametrize("zero", ["k_proj", "v_proj", "self_attn"])
@pytest.mark.parametrize("method", ["svd", "care", "fisher"])
def test_projections_of_zeros(
    tiny: Callable[..., Path], tmp_path: Path, text_file: Path, zero: str, method: str
) -> None:
    """Nothing to keep is kept at any rank, or a sentence says why not."""
    directory = tiny(num_hidden_layers=1)
    path = directory / "model.safetensors"
    tensors = {name: tensor * (zero not in name) for name, tensor in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    text = {"calibration": str(text_file), "samples": 4, "seqlen": 16}
    try:
        care_mla.convert(directory, tmp_path / "out", method=method, ranks="uniform", rank=32, calibration=text)
    except care_mla.errors.ConversionError as refused:
        assert "\n" not in str(refused)
        return
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(directory)(ids, use_cache=False).logits
        found = care_mla.load(tmp_path / "out")(ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
