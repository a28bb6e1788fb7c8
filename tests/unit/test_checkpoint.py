"""Broken checkpoints are named before weights are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from care_mla.checkpoint import CheckpointReader, ShardedWriter, resolve_source
from care_mla.errors import CheckpointError


def _sharded(directory: Path) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    sharded = ShardedWriter(directory, shard_bytes=100)
    for i in range(4):
        sharded.add(f"t{i}", torch.full((10,), float(i)))
    sharded.finish()
    return directory


def test_shards_round_trip(tmp_path: Path) -> None:
    directory = _sharded(tmp_path / "m")
    assert len(list(directory.glob("model-*-of-00002.safetensors"))) == 2
    reader = CheckpointReader(directory)
    assert reader.names == ["t0", "t1", "t2", "t3"]
    assert all(torch.equal(reader[f"t{i}"], torch.full((10,), float(i))) for i in range(4))
    assert reader.get("absent") is None


def test_fingerprint_ignores_sharding_and_sees_one_changed_weight(tmp_path: Path) -> None:
    sharded = CheckpointReader(_sharded(tmp_path / "a"))
    tensors = {name: sharded[name] for name in sharded.names}
    whole = tmp_path / "b"
    whole.mkdir()
    (whole / "config.json").write_text("{}")
    save_file(tensors, whole / "model.safetensors")
    assert CheckpointReader(whole).fingerprint == sharded.fingerprint
    tensors["t2"] = tensors["t2"].clone()
    tensors["t2"][-1] += 1e-6
    save_file(tensors, whole / "model.safetensors")
    assert CheckpointReader(whole).fingerprint != sharded.fingerprint


def test_missing_shard(tmp_path: Path) -> None:
    directory = _sharded(tmp_path / "m")
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002.safetensors is missing"):
        CheckpointReader(directory)


def test_truncated_shard(tmp_path: Path) -> None:
    directory = _sharded(tmp_path / "m")
    shard = directory / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        CheckpointReader(directory)


def test_index_that_promises_too_much(tmp_path: Path) -> None:
    directory = _sharded(tmp_path / "m")
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="promises ghost"):
        CheckpointReader(directory)


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="pickled weights, which are never loaded"):
        CheckpointReader(tmp_path)


def test_damaged_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("source", ["/no/such/place", "./nowhere", "a/b/c"])
def test_source_that_is_no_path_and_no_hub_id(source: str) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve_source(source)


def test_source_without_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        resolve_source(tmp_path)
    (tmp_path / "m.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match="care fetch"):
        resolve_source(tmp_path / "m.gguf")


def test_converted_weights_are_plain_safetensors(tmp_path: Path, tiny: Callable[..., Path], text_file: Path) -> None:
    import care_mla

    out = tmp_path / "converted"
    care_mla.convert(
        tiny(), out, rank=8, ranks="uniform", calibration={"calibration": str(text_file), "samples": 4, "seqlen": 32}
    )
    assert load_file(out / "model.safetensors")["language_model.model.layers.2.self_attn.kv_a_proj.weight"].shape == (
        16,
        48,
    )
    assert not list(out.glob("*.bin")) and not list(out.glob("*.py"))
