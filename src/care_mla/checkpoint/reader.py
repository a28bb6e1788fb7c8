"""Lazy reading of a safetensors checkpoint: one tensor at a time, shards opened when touched."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from care_mla.errors import CheckpointError
from care_mla.files import read_json

WEIGHTS = "model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
INDEX = f"model{INDEX_SUFFIX}"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_RANK_LOCAL = re.compile(r"^shard-[0-9]{5}-model-[0-9]{5}-of-[0-9]{5}\.safetensors$")

_SAMPLE = 4096
"""Elements hashed at either end of every tensor: enough to tell any two trained checkpoints apart without reading 140 GB."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies, known from a shard's header.

    Attributes:
        name: in the shard.
        dtype: as safetensors names it, e.g. "BF16".
    """

    shard: str
    name: str
    dtype: str
    shape: tuple[int, ...]


class CheckpointReader:
    """Tensors of a model directory by name: the files and, of each, the tensors that transformers reads.

    Raises (on construction, before any weight is read):
        CheckpointError: no safetensors, a missing or truncated shard, an index that names absent tensors or that transformers
            cannot read, a tensor in two shards.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.config = read_json(directory / "config.json")
        self.stored = self._headers()
        """By name, in the order of the shards."""
        self._whole = self.stored

    def _headers(self) -> dict[str, StoredTensor]:
        shards, promised = self._shards()
        found: dict[str, StoredTensor] = {}
        for shard in shards:
            for tensor in self._tensors(shard):
                if tensor.name in found:
                    raise CheckpointError(
                        f"{self.directory}: {tensor.name} is stored twice, in {found[tensor.name].shard} and in {shard}, and programs differ in which "
                        "they read; remove one of the two"
                    )
                found[tensor.name] = tensor
        missing = sorted(n for n, shard in promised.items() if n not in found or found[n].shard != shard)
        if missing:
            raise CheckpointError(
                f"{self.directory}: the index promises {missing[0]} in {promised[missing[0]]}, which does not hold it ({len(missing)} such)"
            )
        return found

    def _shards(self) -> tuple[list[str], dict[str, str]]:
        """Files in the order in which transformers reads them, and what an index promises of them: tensor -> file."""
        named = self.config.get("transformers_weights")
        rank_local = next(
            (path.name for path in sorted(self.directory.iterdir()) if _RANK_LOCAL.match(path.name)), None
        )
        if rank_local is not None:
            raise CheckpointError(
                f"{self.directory} holds {rank_local}, a shard of a distributed run, which some versions of transformers read in place of the model; "
                "remove these files, or load the model with transformers and convert what save_pretrained writes"
            )
        if named is not None:
            inside = isinstance(named, str) and (self.directory / named).resolve().is_relative_to(
                self.directory.resolve()
            )
            if not inside or not named.endswith((".safetensors", INDEX_SUFFIX)):
                raise CheckpointError(
                    f"{self.directory}: config.json names transformers_weights {named!r}, which is no safetensors file inside the directory"
                )
            return self._of_index(named) if named.endswith(INDEX_SUFFIX) else ([named], {})
        if (self.directory / WEIGHTS).is_file():
            return [WEIGHTS], {}
        if (self.directory / INDEX).is_file():
            return self._of_index(INDEX)
        pickled = any(self.directory.glob("*.bin")) or any(self.directory.glob("*.pt"))
        variants = sorted(path.name for path in self.directory.glob("model.*.safetensors"))
        if pickled:
            hint = "; it has pickled weights, which are never loaded: convert them to safetensors first"
        elif variants:
            hint = f"; it has {variants[0]}, a variant that is not read by itself: rename it to {WEIGHTS}"
        else:
            hint = ""
        raise CheckpointError(f"{self.directory} has no {WEIGHTS} and no {INDEX}{hint}")

    def _of_index(self, name: str) -> tuple[list[str], dict[str, str]]:
        path = self.directory / name
        index = read_json(path)
        promised = index.get("weight_map")
        if not isinstance(promised, dict) or not promised or not all(isinstance(v, str) for v in promised.values()):
            raise CheckpointError(f'{path} has no "weight_map" from tensors to files; download the checkpoint again')
        if not isinstance(index.get("metadata"), dict):
            raise CheckpointError(
                f'{path} has no "metadata", without which transformers does not load it; add "metadata": {{}} to it'
            )
        shards = sorted(set(promised.values()))
        if foreign := [shard for shard in shards if not shard.endswith(".safetensors")]:
            raise CheckpointError(f"{path} names {foreign[0]}, which is no safetensors file; only those are read")
        return shards, promised

    def _tensors(self, shard: str) -> list[StoredTensor]:
        path = self.directory / shard
        if not path.is_file():
            raise CheckpointError(f"shard {path} is missing; download the checkpoint again")
        try:
            with safe_open(path, framework="pt") as file:
                parts = [(name, file.get_slice(name)) for name in file.keys()]  # noqa: SIM118  (no mapping)
                return [StoredTensor(shard, name, str(p.get_dtype()), tuple(p.get_shape())) for name, p in parts]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"shard {path} is truncated or damaged ({error}); download it again") from error

    def renamed(self, names: Mapping[str, str]) -> CheckpointReader:
        """The same checkpoint with other names, and with nothing but these.

        Args:
            names: wanted name -> name here.
        """
        other = copy(self)
        other.stored = {wanted: self.stored[name] for wanted, name in names.items()}
        return other

    @property
    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self.stored)

    def __contains__(self, name: str) -> bool:
        return name in self.stored

    def __getitem__(self, name: str) -> Tensor:
        """One tensor, in its stored dtype, on the CPU.

        Raises:
            CheckpointError: absent or unreadable.
        """
        if name not in self.stored:
            raise CheckpointError(
                f"{self.directory} has no tensor {name}; the checkpoint is incomplete or of another architecture than config.json says"
            )
        stored = self.stored[name]
        path = self.directory / stored.shard
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(stored.name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{name} cannot be read from {path} ({error})") from error

    def get(self, name: str) -> Tensor | None:
        """One tensor, or None where the checkpoint has none of that name."""
        return self[name] if name in self.stored else None

    @property
    def num_bytes(self) -> int:
        """Size of all shards on disk."""
        return sum(
            (self.directory / shard).stat().st_size for shard in {tensor.shard for tensor in self._whole.values()}
        )

    @property
    def first_dtype(self) -> torch.dtype:
        """Of the first floating-point tensor, which transformers takes where config.json names none; float32 without one."""
        return next((_DTYPES[t.dtype] for t in self._whole.values() if t.dtype in _DTYPES), torch.float32)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over every tensor's name, dtype, shape and both ends of its data, in name order.

        Independent of sharding, of config.json and of what `renamed` leaves, so a copy of the model in another directory has the same one.
        """
        digest = hashlib.sha256()
        by_shard: dict[str, list[str]] = {}
        for name, tensor in self._whole.items():
            by_shard.setdefault(tensor.shard, []).append(name)
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
