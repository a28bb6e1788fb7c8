"""Lazy reading of a safetensors checkpoint: one tensor at a time, shards opened when touched."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from care_mla.errors import CheckpointError

_SAMPLE = 4096
"""Elements hashed at either end of every tensor: enough to tell any two trained checkpoints apart without reading 140 GB."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint directory.

    Raises:
        CheckpointError: missing or damaged.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # nested too deeply, a number of thousands of digits, not UTF-8
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return value


class CheckpointReader:
    """Tensors of a model directory by name.

    Raises (on construction, before any weight is read):
        CheckpointError: no safetensors, a missing or truncated shard, an index that names absent tensors.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.config = read_json(directory / "config.json")
        self._shard_of = self._index()

    def _index(self) -> dict[str, str]:
        index = self.directory / "model.safetensors.index.json"
        if index.is_file():
            weight_map: dict[str, str] = read_json(index).get("weight_map", {})
            shards = sorted(set(weight_map.values()))
        elif (self.directory / "model.safetensors").is_file():
            weight_map, shards = {}, ["model.safetensors"]
        else:
            pickled = any(self.directory.glob("*.bin")) or any(self.directory.glob("*.pt"))
            hint = (
                "; it has pickled weights, which are never loaded: convert them to safetensors first" if pickled else ""
            )
            raise CheckpointError(
                f"{self.directory} has no model.safetensors and no model.safetensors.index.json{hint}"
            )
        found: dict[str, str] = {}
        for shard in shards:
            found.update(dict.fromkeys(self._names(shard), shard))
        missing = sorted(name for name, shard in weight_map.items() if found.get(name) != shard)
        if missing:
            raise CheckpointError(
                f"{self.directory}: the index promises {missing[0]} in {weight_map[missing[0]]}, which does not hold it ({len(missing)} such)"
            )
        return found

    def _names(self, shard: str) -> list[str]:
        path = self.directory / shard
        if not path.is_file():
            raise CheckpointError(f"shard {path} is missing; download the checkpoint again")
        try:
            with safe_open(path, framework="pt") as file:
                return list(file.keys())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"shard {path} is truncated or damaged ({error}); download it again") from error

    @property
    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._shard_of)

    def __contains__(self, name: str) -> bool:
        return name in self._shard_of

    def __getitem__(self, name: str) -> Tensor:
        """One tensor, in its stored dtype, on the CPU.

        Raises:
            CheckpointError: absent or unreadable.
        """
        if name not in self._shard_of:
            raise CheckpointError(
                f"{self.directory} has no tensor {name}; the checkpoint is incomplete or of another architecture than config.json says"
            )
        path = self.directory / self._shard_of[name]
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{name} cannot be read from {path} ({error})") from error

    def get(self, name: str) -> Tensor | None:
        """One tensor, or None where the checkpoint has none of that name."""
        return self[name] if name in self._shard_of else None

    @property
    def num_bytes(self) -> int:
        """Size of all shards on disk."""
        return sum((self.directory / shard).stat().st_size for shard in set(self._shard_of.values()))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over every tensor's name, dtype, shape and both ends of its data, in name order.

        Independent of sharding and of config.json, so a copy of the model in another directory has the same one.
        """
        digest = hashlib.sha256()
        by_shard: dict[str, list[str]] = {}
        for name, shard in self._shard_of.items():
            by_shard.setdefault(shard, []).append(name)
        lines: dict[str, bytes] = {}
        for shard, names in by_shard.items():
            with safe_open(self.directory / shard, framework="pt") as file:
                for name in names:
                    part = file.get_slice(name)
                    shape, dtype = part.get_shape(), part.get_dtype()
                    # Whole leading rows only: a slice reads no more of the file than it covers.
                    rows = max(1, _SAMPLE // max(1, int(torch.tensor(shape[1:]).prod()))) if shape else 0
                    ends = [part[:rows], part[-rows:]] if shape else [file.get_tensor(name)]
                    line = hashlib.sha256(f"{name} {dtype} {shape}".encode())
                    for end in ends:
                        line.update(end.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
                    lines[name] = line.digest()
        for name in sorted(lines):
            digest.update(lines[name])
        return digest.hexdigest()
