"""Writes the converted checkpoint, layer by layer."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from care_mla.checkpoint import ShardedWriter, copy_side_files
from care_mla.config import Recipe
from care_mla.conversion.source import Source
from care_mla.families.spec import Projection


class ConvertedWriter:
    """Streams the converted checkpoint: all tensors that no conversion replaces are copied one by one.

    Attributes:
        dtype: of the written weights.
        biases: names of the biases that were written, by canonical name.
    """

    def __init__(self, source: Source, recipe: Recipe, directory: Path, *, prefix: str):
        """
        Args:
            prefix: of the source model's weights in the converted one.
        """
        self.source, self.directory, self.prefix = source, directory, prefix
        family = source.family
        self.keep_dtypes = recipe.dtype == "auto"
        self.dtype: torch.dtype = source.dtype if self.keep_dtypes else getattr(torch, recipe.dtype)
        self.writer = ShardedWriter(directory)
        self.biases: set[str] = set()
        gone: list[Projection] = ["k", "v"]
        linear = recipe.qk_norm == "linear"
        if recipe.q_lora_rank is not None or linear:
            gone.append("q")
        modules = {family.stored(projection, source.geometry)[0] for projection in gone}
        modules |= {norm for norm in (family.q_norm, family.k_norm) if linear and norm is not None}
        self.replaced = {
            f"{family.attention_name(layer)}.{module}.{kind}"
            for layer in range(source.geometry.num_layers)
            for module in modules
            for kind in ("weight", "bias")
        }

    def add_layer(self, layer: int, tensors: dict[str, Tensor]) -> None:
        """The converted projections of one layer, in place of the source's; q_proj and o_proj under the family's names."""
        self.biases |= {name for name in tensors if name.endswith(".bias")}
        family = self.source.family
        attention, own_names = family.attention_name(layer), {"q_proj": family.q_proj, "o_proj": family.o_proj}
        for canonical, tensor in tensors.items():
            module, dot, kind = canonical.partition(".")
            name = f"{own_names.get(module, module)}{dot}{kind}"
            self.replaced.add(f"{attention}.{name}")
            self.writer.add(f"{self.prefix}{attention}.{name}", tensor.to(self.dtype))

    def finish(self) -> None:
        """Everything that was not replaced, shards, index, and what travels with a checkpoint."""
        for name in self.source.reader.names:
            if name not in self.replaced:
                tensor = self.source.reader[name]
                kept = self.keep_dtypes or not tensor.is_floating_point()
                self.writer.add(self.prefix + name, tensor if kept else tensor.to(self.dtype))
        self.writer.finish()
        copy_side_files(self.source.directory, self.directory)
