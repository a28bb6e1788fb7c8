"""Sharded writing of a checkpoint into a staging directory, and what travels with it."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from care_mla.files import write_json, write_tensors, writing

SHARD_BYTES = 5 * 10**9


class ShardedWriter:
    """Collects tensors and writes a shard whenever `SHARD_BYTES` are together; never holds more than one shard."""

    def __init__(self, directory: Path, *, shard_bytes: int = SHARD_BYTES):
        self.directory = directory
        self.shard_bytes = shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Queue one tensor; writes a shard first if it would grow too large."""
        size = tensor.numel() * tensor.element_size()
        if (
            self._pending
            and sum(t.numel() * t.element_size() for t in self._pending.values()) + size > self.shard_bytes
        ):
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._total += size

    def _part(self, number: int) -> Path:
        return self.directory / f"part-{number:05d}.safetensors"

    def _flush(self) -> None:
        write_tensors(self._part(len(self._shards)), self._pending, metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending = {}

    def finish(self) -> None:
        """Write what is left, give the shards their final names, and the index."""
        if self._pending:
            self._flush()
        count = len(self._shards)
        if count == 1:
            self._rename(0, "model.safetensors")
            return
        weight_map = {}
        for number, names in enumerate(self._shards):
            final = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._rename(number, final)
            weight_map.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(self.directory / "model.safetensors.index.json", index)

    def _rename(self, number: int, name: str) -> None:
        with writing(self.directory / name):
            self._part(number).rename(self.directory / name)
