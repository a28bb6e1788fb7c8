"""Spectra of all layers under one recipe, and what truncating them costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from care_mla.config import Recipe
from care_mla.errors import NumericalError
from care_mla.files import write_tensors
from care_mla.linalg import Factors, Spectrum, decompose, truncate
from care_mla.mapping import (
    position_free,
    predicted_loss_increase,
    relative_errors,
    share,
    split_blocks,
)
from care_mla.methods import Metric, Weighting, get_method
from care_mla.names import Layout
from care_mla.pipeline.evidence import Evidence, SharedEigenpairs
from care_mla.pipeline.source import Source
from care_mla.progress import Track, silent
from care_mla.ranks import RankPlan
from care_mla.ranks.plan import BLOCKS
from care_mla.rope import (
    RotarySelection,
    complex_moment,
    components,
    dropped_rotation,
    predicted_rotation_loss,
    select,
)
from care_mla.stats import LayerStatistics, StatisticsStore


class LayerSpectra:
    """Spectra of all layers under one recipe, computed layer by layer and kept on disk: only energies stay in memory."""

    def __init__(
        self,
        source: Source,
        statistics: StatisticsStore,
        recipe: Recipe,
        directory: Path,
        *,
        shared: SharedEigenpairs | None = None,
        track: Track = silent,
    ):
        """
        Args:
            directory: for the spectra, one file a layer and block.
            shared: where other recipes are compared with this one.
        """
        self.directory = directory
        self.layout = recipe.layout
        self.num_blocks = len(BLOCKS[recipe.layout])
        self.energies: list[list[Tensor]] = [[] for _ in range(self.num_blocks)]  # [block][layer]
        self.means: list[Tensor | None] = []  # [layer]
        self.selections: list[RotarySelection] = []  # [layer], layout mla
        self.frequencies: Tensor | None = None  # [F] angles per position, layout mla
        self.rotation_cost: Tensor | None = None  # [F], layout mla
        self.notes: list[str] = [*statistics.notes]  # what the user should know of the statistics
        self.evidence = Evidence(source, statistics, recipe)
        method = get_method(recipe.method)
        rows = split_blocks(recipe.layout, source.geometry.kv_width)
        for layer in track(range(source.geometry.num_layers), "Decomposing", source.geometry.num_layers, unit="layers"):
            collected, W = self.evidence.carried(layer, with_fisher=method.needs_fisher)
            if shared is not None and method.needs_fisher:
                collected = shared.add_to(collected, layer, normalized=self.evidence.at_normalized_keys)
            self._note_evidence(layer, collected, recipe)
            metric = method.metric(collected, W, weighting_of(recipe))
            self.means.append(metric.mean)
            if recipe.layout == "mla":
                self.selections.append(self._select(source, metric, recipe))
                B = position_free(self.selections[layer])
                W = B @ W
                metric = method.metric(collected.carrying(B), W, weighting_of(recipe))
            for block, block_rows in enumerate(rows):
                part = metric.block(block_rows)
                try:
                    spectrum = decompose(part.second_moment, part.output_metric, outputs_of=W[block_rows])
                except NumericalError as error:
                    tokens = int(collected.moments.num_tokens)
                    raise NumericalError(f"layer {layer}, calibrated on {tokens} tokens: {error}") from error
                write_tensors(self._file(layer, block), {"encoder": spectrum.encoder, "decoder": spectrum.decoder})
                self.energies[block].append(spectrum.energies)

    def _select(self, source: Source, metric: Metric, recipe: Recipe) -> RotarySelection:
        """Which pairs of one layer's keys stay rotary."""
        geometry = source.geometry
        if self.frequencies is None or self.rotation_cost is None:
            from care_mla.modeling import rotary_frequencies

            self.frequencies = rotary_frequencies(source.reader.config)
            self.rotation_cost = dropped_rotation(self.frequencies, recipe.context)
        keys = metric.block(split_blocks("split", geometry.kv_width)[0])
        about_zero = keys.second_moment
        if keys.mean is not None:  # the mean of a key turns too, and position-free it would be lost in softmax
            about_zero = about_zero + torch.outer(keys.mean, keys.mean)
        assert recipe.qk_rope_head_dim is not None and recipe.freq_fold is not None
        moment = complex_moment(about_zero, geometry.head_dim, recipe.freq_fold)
        weights = (
            None
            if keys.output_metric is None
            else complex_moment(keys.output_metric.matrix, geometry.head_dim, recipe.freq_fold)
        )
        if recipe.rope == "transmla":
            moment, weights = moment.real.to(moment.dtype), None
        pairs, parts = recipe.qk_rope_head_dim // 2, components(moment, weights)
        return select(parts, self.rotation_cost, pairs, geometry.num_kv_heads, recipe.rope)

    def carried(self, layer: int) -> Tensor | None:
        """B where a layer's latent carries B [k ; v]; None: all of it."""
        return position_free(self.selections[layer]) if self.selections else None

    def _note_evidence(self, layer: int, collected: LayerStatistics, recipe: Recipe) -> None:
        """Fewer tokens than directions: what the shrinkage is filling in. One note, of the first layer."""
        fisher = collected.fisher
        if layer == 0 and fisher is not None and int(fisher.num_tokens) < len(fisher.output_sum):
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

    def named_energies(self, layout: Layout) -> dict[str, Tensor]:
        """Energies as float32 tensors [layers, n] by block name, for the report."""
        return {name: torch.stack(block).float() for name, block in zip(BLOCKS[layout], self.energies, strict=True)}


def layer_records(spectra: LayerSpectra, plan: RankPlan) -> list[dict[str, Any]]:
    return [layer_record(spectra, plan, layer) for layer in range(len(plan.ranks))]


def layer_record(spectra: LayerSpectra, plan: RankPlan, layer: int) -> dict[str, Any]:
    """What the manifest says of one layer."""
    factors = spectra.factors(layer, plan.ranks[layer])
    energies = [block[layer] for block in spectra.energies]
    residuals = [float(e[rank:].sum()) for e, rank in zip(energies, plan.ranks[layer], strict=True)]
    collected, _ = spectra.evidence.carried(layer, with_fisher=spectra.evidence.has_fisher)
    mean, carried = spectra.means[layer], spectra.carried(layer)
    k_error, v_error = relative_errors(
        factors,
        collected.moments.second_moment,
        layout=plan.layout,
        plain_mean=collected.moments.mean,
        mean=mean,
        carried=carried,
    )
    predicted: float | None = None
    rotation: dict[str, float] = {}
    if collected.fisher is not None:
        predicted = predicted_loss_increase(factors, collected, layout=plan.layout, mean=mean, carried=carried)
        if spectra.rotation_cost is not None:
            keys = split_blocks("split", len(collected.fisher.output_sum) // 2)[0]
            curvature = collected.fisher.curvature(collected.moments.second_moment)[keys, keys]
            moment = collected.fisher.second_moment[keys, keys]
            lost = predicted_rotation_loss(spectra.selections[layer], spectra.rotation_cost, curvature, moment)
            rotation = {"predicted_rotation_loss": lost}
            predicted += lost
    return {
        "ranks": list(plan.ranks[layer]),
        "residual": residuals,
        "kept_energy": [1.0 - share(e[rank:], e) for e, rank in zip(energies, plan.ranks[layer], strict=True)],
        "relative_error": {"k": k_error, "v": v_error},
        "predicted_loss_increase": predicted,
        **rotation,
        **({"norm_error": spectra.evidence.norm_errors(layer)} if spectra.evidence.linear else {}),
    }


def predicted_total(layers: Sequence[dict[str, Any]]) -> float | None:
    """Predicted loss increase of a whole conversion."""
    parts = [layer["predicted_loss_increase"] for layer in layers]
    return None if None in parts else sum(parts)


def weighting_of(recipe: Recipe) -> Weighting:
    """The part of a recipe that the methods take, its exponent decided."""
    assert recipe.fisher_exponent is not None
    return Weighting(
        shrinkage=recipe.shrinkage,
        fisher_exponent=recipe.fisher_exponent,
        fisher_shrinkage=recipe.fisher_shrinkage,
        centre=recipe.centre,
    )
