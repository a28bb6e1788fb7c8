"""Spectra of all layers under one recipe: what truncation to any rank would cost."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from care_mla.conversion.decide import Decision
from care_mla.conversion.evidence import Evidence, SharedEigenpairs
from care_mla.conversion.linear_norms import LinearNormsEvidence
from care_mla.conversion.source import Source
from care_mla.errors import NumericalError
from care_mla.files import write_tensors
from care_mla.layouts import LatentContent
from care_mla.linalg import Factors, Spectrum, decompose, truncate
from care_mla.progress import Track, silent
from care_mla.ranks import RankPlan, allocate
from care_mla.stats import LayerStatistics, StatisticsStore


class Spectra:
    """Spectra of all layers under one recipe, computed layer by layer and kept on disk: only energies stay in memory.

    Attributes:
        energies: [block][layer], [n] each.
        means: [layer], mu that is given back as a constant, [2n]; None: not centred.
        contents: [layer], what the latents carry.
        notes: what the user should know of the statistics.
    """

    def __init__(
        self,
        source: Source,
        statistics: StatisticsStore,
        decision: Decision,
        directory: Path,
        *,
        shared: SharedEigenpairs | None = None,
        track: Track = silent,
    ):
        """
        Args:
            directory: for the spectra, one file a layer and block.
            shared: where other recipes are compared with this one.

        Raises:
            NumericalError: with the layer named.
        """
        self.decision, self.directory, self.shared = decision, directory, shared
        linear = decision.recipe.qk_norm == "linear"
        self.evidence = (LinearNormsEvidence if linear else Evidence)(source, statistics, decision)
        self.energies: list[list[Tensor]] = [[] for _ in decision.layout.blocks]
        self.means: list[Tensor | None] = []
        self.contents: list[LatentContent] = []
        self.notes: list[str] = [*statistics.notes]
        num_layers = source.geometry.num_layers
        for layer in track(range(num_layers), "Decomposing", num_layers, unit="layers"):
            self._decompose(layer)

    def _decompose(self, layer: int) -> None:
        layout, method, weighting = self.decision.layout, self.decision.method, self.decision.weighting
        collected, W = self.evidence.latent_outputs(layer, with_fisher=method.needs_fisher)
        if self.shared is not None and method.needs_fisher:
            collected = self.shared.add_to(collected, layer, normalized=self.evidence.normalized_gradients)
        if layer == 0:
            self._note_evidence(collected)
        metric = method.metric(collected, W, weighting)
        content = layout.content(metric, self.decision.facts, self.decision.options)
        self.means.append(metric.mean)
        self.contents.append(content)
        if content.map is not None:
            W = content.map @ W
            metric = method.metric(collected.carrying(content.map), W, weighting)
        for block, rows in enumerate(layout.rows(len(W) // 2)):
            part = metric.block(rows)
            try:
                spectrum = decompose(part.second_moment, part.output_metric, outputs_of=W[rows])
            except NumericalError as error:
                tokens = int(collected.moments.num_tokens)
                raise NumericalError(f"layer {layer}, calibrated on {tokens} tokens: {error}") from error
            write_tensors(self._file(layer, block), {"encoder": spectrum.encoder, "decoder": spectrum.decoder})
            self.energies[block].append(spectrum.energies)

    def _note_evidence(self, collected: LayerStatistics) -> None:
        """Fewer tokens than directions: what the shrinkage is filling in."""
        fisher, recipe = collected.fisher, self.decision.recipe
        if fisher is not None and int(fisher.num_tokens) < len(fisher.output_sum):
            self.notes.append(
                f"calibrated on {int(fisher.num_tokens)} tokens, fewer than the {len(fisher.output_sum)} directions of keys and values: "
                f"gradients give evidence of {collected.gradients.effective_rank:.0f} (effective rank, layer 0), --shrinkage {recipe.shrinkage:g} and "
                f"--fisher-shrinkage {recipe.fisher_shrinkage:g} fill in the rest; give more --samples"
            )

    def _file(self, layer: int, block: int) -> Path:
        return self.directory / f"spectrum_{layer}_{block}.safetensors"

    def factors(self, layer: int, ranks: Sequence[int]) -> list[Factors]:
        """Truncated factors of one layer, one for each block."""
        result = []
        for block, rank in enumerate(ranks):
            tensors = load_file(self._file(layer, block))
            result.append(truncate(Spectrum(self.energies[block][layer], tensors["encoder"], tensors["decoder"]), rank))
        return result

    def of(self, decision: Decision) -> Spectra:
        """The same spectra for another budget.

        Args:
            decision: with the same `spectra_key`.
        """
        assert decision.spectra_key == self.decision.spectra_key
        same = copy(self)
        same.decision = decision
        return same

    def allocate(self) -> RankPlan:
        """The ranks of all layers: the recipe's allocator spends its budget on these energies.

        Raises:
            RankError
        """
        recipe = self.decision.recipe
        assert recipe.ranks is not None
        return allocate(
            recipe.ranks,
            self.energies,
            self.decision.budget,
            min_rank=recipe.min_rank,
            max_rank=recipe.max_rank,
            multiple=recipe.rank_multiple,
        )

    def named_energies(self) -> dict[str, Tensor]:
        """Energies as float32 tensors [layers, n] by block name, for the report."""
        blocks = self.decision.layout.blocks
        return {name: torch.stack(block).float() for name, block in zip(blocks, self.energies, strict=True)}
