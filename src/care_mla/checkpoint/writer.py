"""Atomic, sharded writing: everything goes to a staging directory beside the target and is renamed when whole."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from care_mla.errors import CheckpointError

SHARD_BYTES = 5 * 10**9


def require_writable(out: Path, overwrite: bool) -> None:
    """Refuse an existing target unless overwriting is asked for, or one whose parent cannot be written.

    Raises:
        CheckpointError
    """
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} exists and is not a directory")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise CheckpointError(f"{out} exists; choose another --out or pass --overwrite")
    parent = out.resolve().parent
    existing = next(p for p in (parent, *parent.parents) if p.exists())
    if not os.access(existing, os.W_OK):
        raise CheckpointError(f"{existing} is not writable; choose another --out")


@contextmanager
def atomic_directory(out: Path, *, overwrite: bool = False, needed_bytes: int = 0) -> Iterator[Path]:
    """A staging directory that becomes `out` on success and vanishes on any error, Ctrl-C included.

    Args:
        needed_bytes: checked against the free space before anything is written.

    Raises:
        CheckpointError: existing target without overwrite, or a full disk.
    """
    require_writable(out, overwrite)
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if needed_bytes > free:
        raise CheckpointError(f"{out.parent} has {free / 1e6:,.1f} MB free, {needed_bytes / 1e6:,.1f} MB are needed")
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    try:
        staging.chmod(0o755)
        yield staging
        retired = staging.with_name(staging.name + ".old")
        if out.exists():
            out.rename(retired)
        staging.rename(out)
        shutil.rmtree(retired, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise CheckpointError(f"the disk of {out.parent} is full; nothing was left there") from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


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
        save_file(self._pending, self._part(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending = {}

    def finish(self) -> None:
        """Write what is left, give the shards their final names, and the index."""
        if self._pending:
            self._flush()
        count = len(self._shards)
        if count == 1:
            self._part(0).rename(self.directory / "model.safetensors")
            return
        weight_map = {}
        for number, names in enumerate(self._shards):
            final = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self.directory / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))}
        (self.directory / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n", encoding="utf-8"
        )
