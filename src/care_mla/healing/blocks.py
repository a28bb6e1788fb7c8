"""Documents packed into blocks of one length, read in an order that a seed decides.

Attention must not cross documents: positions start again at each, from which transformers makes the mask; see `packed_inputs`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_masks_for_generate

from care_mla.errors import CalibrationError
from care_mla.families import FamilySpec


@dataclass(frozen=True)
class Blocks:
    """Packed text.

    Attributes:
        input_ids: [blocks, seqlen] int32.
        positions: [blocks, seqlen] int32, position of each token in its document; 0 begins one, and every block.
    """

    input_ids: Tensor
    positions: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, rows: Tensor) -> Blocks:
        return Blocks(self.input_ids[rows], self.positions[rows])

    @property
    def num_tokens(self) -> int:
        """Tokens of all blocks."""
        return self.input_ids.numel()

    def to_tensors(self) -> dict[str, Tensor]:
        """Named tensors for safetensors."""
        return {"input_ids": self.input_ids, "positions": self.positions}


def pack(documents: Iterable[Tensor], seqlen: int, max_blocks: int) -> Blocks:
    """Documents one after the other, cut into blocks; a document may go on in the next block, where its positions start again.

    Args:
        documents: token ids of each; no more are read than the blocks need. The rest that fills no block is dropped.
    """
    ids: list[Tensor] = []
    positions: list[Tensor] = []
    collected = 0
    for document in documents:
        ids.append(document.to(torch.int32))
        positions.append(torch.arange(len(document), dtype=torch.int32))
        collected += len(document)
        if collected >= max_blocks * seqlen:
            break
    count = min(max_blocks, collected // seqlen)
    if not count:
        return Blocks(torch.zeros(0, seqlen, dtype=torch.int32), torch.zeros(0, seqlen, dtype=torch.int32))
    flat = torch.cat(positions)[: count * seqlen].view(count, seqlen)
    # A document that began before the block starts anew in it.
    along = torch.arange(seqlen, dtype=torch.int32)
    begun = torch.where(flat == 0, along, torch.zeros_like(along)).cummax(1).values
    return Blocks(torch.cat(ids)[: count * seqlen].view(count, seqlen), along - begun)


def packed_inputs(model: Any, family: FamilySpec, input_ids: Tensor, positions: Tensor) -> dict[str, Any]:
    """What a model is called with, so that attention stays within documents."""
    inputs = {"input_ids": input_ids, "position_ids": positions, "use_cache": False}
    if family.masks_packed:
        return inputs
    like = torch.empty(*input_ids.shape, 1, dtype=model.dtype, device=input_ids.device)
    masks = create_masks_for_generate(model.config.get_text_config(), like, None, None, position_ids=positions)
    return {**inputs, "attention_mask": masks}


@dataclass(frozen=True)
class Order:
    """Which blocks a step reads: every epoch all of them, shuffled anew. A function of the seed and the step alone.

    Attributes:
        num_blocks: of the training text.
        batch_size: blocks of one step, over all processes.
    """

    num_blocks: int
    batch_size: int
    seed: int

    def rows(self, step: int) -> Tensor:
        """Blocks of a step, counted from 0; [batch_size]."""
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        epochs = {place // self.num_blocks for place in places}
        shuffled = {epoch: self._epoch(epoch) for epoch in epochs}
        return torch.stack([shuffled[place // self.num_blocks][place % self.num_blocks] for place in places])

    def _epoch(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.num_blocks, generator=generator)


def held_out(blocks: Blocks, count: int, seed: int) -> tuple[Blocks, Blocks]:
    """Training and evaluation blocks, drawn apart.

    Raises:
        CalibrationError: nothing would be left to train on.
    """
    if len(blocks) <= count:
        raise CalibrationError(
            f"the text makes {len(blocks)} blocks of {blocks.input_ids.shape[1]} tokens, {count} are held out for evaluation: nothing is left to "
            "train on; give more text, a smaller --seqlen or fewer --eval-blocks"
        )
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
    return blocks[order[count:].sort().values], blocks[order[:count]]
