"""The teacher's most likely tokens, kept on disk: a run that reads them does not run the teacher."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from care_mla.errors import HealingError
from care_mla.files import write_tensors, writing
from care_mla.healing.blocks import Blocks
from care_mla.healing.processes import is_main, wait
from care_mla.progress import Track

TopOf = Callable[[Blocks], tuple[Tensor, Tensor]]
"""Blocks -> the teacher's first k log-probabilities and ids, each [blocks, seqlen, k]."""


@dataclass(frozen=True)
class TopProbabilities:
    """Log-probabilities and ids of the teacher's first k tokens at every position of the training blocks.

    Attributes:
        top: [blocks, seqlen, k] float32.
        ids: [blocks, seqlen, k] int32.
    """

    top: Tensor
    ids: Tensor

    def rows(self, rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Those of some blocks, ready for a pass."""
        return self.top[rows].to(device), self.ids[rows].long().to(device)


def key_of(blocks: Blocks, teacher: str, count: int, temperature: float) -> str:
    """Fingerprint of what stored probabilities belong to.

    Args:
        teacher: fingerprint of its weights.
    """
    digest = hashlib.sha256(json.dumps([teacher, count, temperature]).encode())
    for tensor in (blocks.input_ids, blocks.positions):
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def read_top_probabilities(path: Path) -> TopProbabilities | None:
    """What an earlier run left at `path`; None where there is nothing.

    Raises:
        HealingError: damaged.
    """
    if not path.is_file():
        return None
    try:
        tensors = load_file(path)
        return TopProbabilities(tensors["top"], tensors["ids"])
    except Exception as error:  # safetensors' own types, KeyError, OSError: all mean that the file is damaged
        raise HealingError(f"the teacher's probabilities in {path} are damaged ({error}); delete the file") from error


def write_top_probabilities(
    blocks: Blocks, path: Path, batch_size: int, top_of: TopOf, track: Track
) -> TopProbabilities:
    """Run the teacher over all blocks once and keep what it says; the file appears whole or not at all.

    Several processes share the blocks out; all of them make equally many passes, as a sharded teacher needs it.
    """
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    own = torch.arange(rank, rank + len(blocks), processes).clamp_max(len(blocks) - 1)[: -(-len(blocks) // processes)]
    tops, ids = [], []
    batches = own.split(batch_size)
    for rows in track(batches, "Running the teacher", len(own), unit="blocks", size=len):
        top, id_ = top_of(blocks[rows])
        tops.append(top.float().cpu())
        ids.append(id_.to(torch.int32).cpu())
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(_part(path, rank), {"rows": own, "top": torch.cat(tops), "ids": torch.cat(ids)})
    wait()
    if is_main():
        parts = [load_file(_part(path, process)) for process in range(processes)]
        order = torch.cat([part["rows"] for part in parts]).argsort(stable=True)[: len(blocks)]
        whole = {name: torch.cat([part[name] for part in parts])[order] for name in ("top", "ids")}
        write_tensors(path, whole)
        for process in range(processes):
            _part(path, process).unlink()
    wait()
    result = read_top_probabilities(path)
    assert result is not None
    return result


def _part(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}.partial")
