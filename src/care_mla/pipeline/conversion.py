"""Conversion: statistics and a recipe become a checkpoint, a manifest and a report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from care_mla.checkpoint import Kind, ShardedWriter, claim, copy_side_files, require_output
from care_mla.config import CalibrationSettings, Recipe
from care_mla.errors import ConfigError
from care_mla.families.spec import Projection
from care_mla.files import vanishing, write_json, write_tensors, writing
from care_mla.linalg import Factors
from care_mla.mapping import dense_projections, latent_tensors, mla_tensors
from care_mla.methods import get_method
from care_mla.pipeline.evaluation import draw_report
from care_mla.pipeline.evidence import SharedEigenpairs, require_statistics
from care_mla.pipeline.inputs import inputs_of
from care_mla.pipeline.planning import rank_plan, require_recipe, settle
from care_mla.pipeline.queries import low_rank_queries
from care_mla.pipeline.source import Source, open_source
from care_mla.pipeline.spectra import LayerSpectra, layer_record, predicted_total
from care_mla.pipeline.statistics import open_statistics, write_statistics
from care_mla.pipeline.verification import require_same_weights, require_true_spec
from care_mla.progress import Track, shown
from care_mla.ranks import RankPlan
from care_mla.records.artifacts import MANIFEST, SPECTRA, versions
from care_mla.runtime import memory_named, resolve_device
from care_mla.stats import StatisticsStore

if TYPE_CHECKING:
    from care_mla.calibration import Propagation

REFIT_LOWER = "lower --refit-tokens or --seqlen, choose another --device, or use --no-refit"
"""What takes less memory where the refit runs short."""


def convert(
    source: str | Path,
    out: str | Path,
    *,
    stats: str | Path | None = None,
    calibration: dict[str, Any] | None = None,
    overwrite: bool = False,
    device: str | int | torch.device | None = None,
    track: Track = shown,
    **recipe: Any,
) -> dict[str, Any]:
    """Convert a checkpoint to the latent layout.

    Args:
        source: model directory or hub id.
        out: directory of the converted model; appears whole or not at all.
        stats: STATS directory of `calibrate`; without it, the source is calibrated first as `calibration` says.
        calibration: fields of `CalibrationSettings`.
        device: of the forward passes, see `runtime.resolve_device`.
        recipe: fields of `Recipe`.

    Returns:
        The manifest, as saved in `out`.

    Raises:
        ConversionError: nothing is left at `out` then.
    """
    chosen: Recipe = Recipe.make(**recipe)
    if stats is not None and calibration:
        raise ConfigError(
            "give either --stats or calibration options, not both: the statistics say what they were calibrated on"
        )
    method = get_method(chosen.method)
    needs = {
        "inputs": method.needs_inputs or chosen.q_lora_rank is not None,
        "fisher": method.needs_fisher,
        "normalized": chosen.qk_norm == "linear",
    }
    settings: CalibrationSettings = CalibrationSettings.make(**{**needs, **(calibration or {})})
    where = resolve_device(device)
    out = Path(out)
    inputs = inputs_of(source=source, stats=stats, text=None if stats is not None else settings.calibration)
    require_output(out, Kind.CONVERTED, inputs, overwrite=overwrite)
    opened = open_source(source)
    inputs += inputs_of(source=opened.directory)
    require_true_spec(opened)
    options = require_recipe(opened, chosen)
    statistics = open_statistics(opened, stats) if stats is not None else None
    if statistics is not None:
        require_statistics(statistics, chosen)

    with (
        claim(out, Kind.CONVERTED, inputs, overwrite=overwrite) as claimed,
        claimed.staging(opened.reader.num_bytes) as staging,
        _workspace(staging) as work,
    ):
        if statistics is None:
            write_statistics(opened, work, settings, device=where, dtype="auto", track=track)
            statistics = StatisticsStore(work)
        shared = SharedEigenpairs(work) if len(options) > 1 else None
        chosen, budget, rotary_widths = settle(opened, statistics, options, track, shared)
        spectra = LayerSpectra(opened, statistics, chosen, work, shared=shared, track=track)
        plan = rank_plan(spectra, budget, chosen)
        propagation = _propagation(opened, statistics, chosen, where) if chosen.refit else None
        writer = _CheckpointBuilder(opened, chosen, plan, staging)
        layers = []
        title = "Refitting and writing layers" if chosen.refit else "Writing layers"
        for layer in track(range(opened.geometry.num_layers), title, opened.geometry.num_layers, unit="layers"):
            factors = spectra.factors(layer, plan.ranks[layer])
            record = layer_record(spectra, plan, layer)
            if plan.layout == "mla":
                weights = spectra.evidence.attention(layer)
                queries = low_rank_queries(opened.geometry, spectra, weights, chosen, layer)
                tensors = mla_tensors(
                    weights,
                    spectra.selections[layer],
                    factors[0],
                    num_kv_heads=opened.geometry.num_kv_heads,
                    head_dim=opened.geometry.head_dim,
                    mean=spectra.means[layer],
                    queries=None if queries is None else queries.factors,
                )
                record["relative_error"] |= {} if queries is None else {"q": queries.relative_error}
            else:
                tensors = converted_tensors(opened, layer, factors, spectra)
            if propagation is not None:
                with memory_named("output projections were refitted", where, REFIT_LOWER):
                    refitted = propagation.refit(layer, dense_projections(tensors))
                tensors["o_proj.weight"] = refitted.weight
                record["output_error"] = {"before": refitted.error_before, "after": refitted.error_after}
            writer.add_layer(layer, tensors)
            layers.append(record)
        writer.finish([s.frequencies.tolist() for s in spectra.selections] or None)
        write_tensors(staging / SPECTRA, spectra.named_energies(plan.layout))
        manifest = {
            "format": "care-mla manifest 1",
            "source": {
                "name": opened.name,
                "fingerprint": opened.reader.fingerprint,
                "model_type": opened.family.model_type,
                "geometry": opened.geometry.to_dict(),
            },
            "recipe": chosen.model_dump(),
            "plan": plan.to_dict(),
            "cache_elements_per_token": plan.cache_elements_per_token,
            "source_cache_elements_per_token": opened.geometry.cache_elements_per_token,
            "kv_save": plan.kv_save(opened.geometry),
            "predicted_loss_increase": predicted_total(layers),
            "predicted_by_rotary_width": {str(width): lost for width, lost in rotary_widths.items()},
            "layers": layers,
            "notes": spectra.notes,
            "calibration": statistics.metadata,
            "versions": versions(),
        }
        write_json(staging / MANIFEST, manifest)
        draw_report(staging)
    return manifest


def converted_tensors(
    source: Source, layer: int, factors: Sequence[Factors], spectra: LayerSpectra
) -> dict[str, Tensor]:
    """Weights of an attention of layout joint or split that are not the source's under the same name, by canonical name."""
    parts: tuple[Projection, ...] = ("q", "k", "v")
    stored = {part: source.projection(layer, part) for part in parts}
    tensors = latent_tensors(
        factors,
        source.stacked_weights(layer),
        layout=spectra.layout,
        k_bias=stored["k"][1],
        v_bias=stored["v"][1],
        mean=spectra.means[layer],
    )
    if source.family.qkv_proj is not None:
        weight, bias = stored["q"]
        tensors |= {"q_proj.weight": weight} if bias is None else {"q_proj.weight": weight, "q_proj.bias": bias}
    return tensors


def _propagation(source: Source, statistics: StatisticsStore, recipe: Recipe, device: torch.device) -> Propagation:
    from care_mla.calibration import Propagation
    from care_mla.modeling import load
    from care_mla.text import TokenWindows

    windows = TokenWindows.from_tensors(statistics.windows()).thinned(recipe.refit_tokens)
    model = load(source.directory, device=device)
    require_same_weights(source, model)
    with memory_named("the text was read for the refit", device, REFIT_LOWER):
        return Propagation(model, source.family, windows, ridge=recipe.refit_ridge)


@contextmanager
def _workspace(staging: Path) -> Iterator[Path]:
    """A scratch directory on the target's disk, gone before the target is renamed."""
    with vanishing(staging / "work") as work:
        with writing(work):
            work.mkdir()
        yield work


class _CheckpointBuilder:
    """Streams the converted checkpoint: all tensors but the key and value projections are copied one by one."""

    def __init__(self, source: Source, recipe: Recipe, plan: RankPlan, directory: Path):
        from care_mla.modeling import LANGUAGE_MODEL

        self.source, self.recipe, self.plan, self.directory = source, recipe, plan, directory
        self.prefix = f"{LANGUAGE_MODEL}."
        family = source.family
        self.dtype = source.dtype if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
        self.keep_dtypes = recipe.dtype == "auto"
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

    def finish(self, rope_frequencies: list[list[int]] | None) -> None:
        """Everything that was not replaced, shards, index, config.json and what travels with a checkpoint."""
        from care_mla.modeling import converted_config

        for name in self.source.reader.names:
            if name not in self.replaced:
                tensor = self.source.reader[name]
                kept = self.keep_dtypes or not tensor.is_floating_point()
                self.writer.add(self.prefix + name, tensor if kept else tensor.to(self.dtype))
        self.writer.finish()
        config = converted_config(
            self.source.reader.config,
            self.plan,
            biases=self.biases,
            dtype=str(self.dtype).removeprefix("torch."),
            rope_frequencies=rope_frequencies,
            q_lora_rank=self.recipe.q_lora_rank,
            qk_norm=self.recipe.qk_norm,
        )
        write_json(self.directory / "config.json", config)
        copy_side_files(self.source.directory, self.directory)
