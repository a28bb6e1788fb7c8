"""Statistics of a running model: a forward sweep for the moments, and a sweep back for the gradients, weighed by the finished moments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from care_mla.calibration.labels import label_variates, sampled_gradient
from care_mla.calibration.taps import WITHOUT_FISHER, FisherTap, MomentsTap, NormalizedTap, Tap, announce, attached
from care_mla.checkpoint import scratch
from care_mla.errors import CalibrationError
from care_mla.families import FamilySpec
from care_mla.families.spec import Projection
from care_mla.progress import Track, silent
from care_mla.runtime import LayerWalk
from care_mla.stats import FisherMoments, Moments, NormalizedStatistics
from care_mla.text import TokenWindows

ZERO = {
    "kv": (
        "there is nothing to measure or factorize",
        "the checkpoint is damaged, or the layer was never trained",
    ),
    "o": (
        "no gradient reaches its keys and values, so gradients are all zero there",
        f"{WITHOUT_FISHER}, or mend the checkpoint",
    ),
}
"""By kind of projection: what follows from its weights being zero, and what to do."""


class Sink(Protocol):
    """Takes a layer's statistics as soon as they are complete; layers come in any order. See `stats.StatisticsWriter`."""

    def write_layer(self, layer: int, moments: Moments) -> None: ...

    def write_fisher(self, layer: int, fisher: FisherMoments) -> None: ...

    def write_normalized_fisher(self, layer: int, fisher: FisherMoments) -> None: ...

    def write_normalized(self, layer: int, normalized: NormalizedStatistics) -> None: ...


@dataclass
class Collected:
    """A `Sink` that keeps everything, by layer."""

    moments: dict[int, Moments] = field(default_factory=dict)
    fisher: dict[int, FisherMoments] = field(default_factory=dict)
    normalized_fisher: dict[int, FisherMoments] = field(default_factory=dict)
    normalized: dict[int, NormalizedStatistics] = field(default_factory=dict)

    def write_layer(self, layer: int, moments: Moments) -> None:
        self.moments[layer] = moments

    def write_fisher(self, layer: int, fisher: FisherMoments) -> None:
        self.fisher[layer] = fisher

    def write_normalized_fisher(self, layer: int, fisher: FisherMoments) -> None:
        self.normalized_fisher[layer] = fisher

    def write_normalized(self, layer: int, normalized: NormalizedStatistics) -> None:
        self.normalized[layer] = normalized


def collect_moments(
    model: Any,
    family: FamilySpec,
    windows: TokenWindows,
    sink: Sink,
    *,
    with_inputs: bool = False,
    normalized: bool = False,
    batch_size: int = 8,
    track: Track = silent,
) -> None:
    """Moments of every layer from one forward sweep over the windows; nothing but the sums is kept.

    Args:
        with_inputs: also E[x x^T], for care_c and low-rank queries.
        normalized: also `NormalizedStatistics`, of a family with QK-norm over heads.

    Raises:
        CalibrationError: non-finite activations, with the layer named.
    """
    geometry = family.geometry(model.config.to_dict())
    _require_weights(model, family, ("k", "v"))
    walk = LayerWalk(model, family, windows.batches(batch_size))
    for layer in track(range(geometry.num_layers), "Collecting moments", geometry.num_layers, unit="layers"):
        moments = MomentsTap(layer, geometry, model.device, with_inputs=with_inputs)
        beside = [NormalizedTap(layer, geometry, model.device, with_keys=True)] if normalized else []
        _forward(walk, layer, [moments, *beside])
        sink.write_layer(layer, moments.moments)
        for tap in beside:
            sink.write_normalized(layer, tap.statistics(None))


def collect_fisher(
    model: Any,
    family: FamilySpec,
    windows: TokenWindows,
    sink: Sink,
    *,
    seed: int = 42,
    with_inputs: bool = False,
    normalized: bool = False,
    normalized_keys: bool = False,
    batch_size: int = 4,
    inputs: Path | None = None,
    track: Track = silent,
) -> None:
    """Moments and Fisher statistics of every layer from a sweep forward and a sweep back.

    Gradients are weighed by the finished moments, and labels are drawn window by window, so nothing depends on how windows are put into
    batches. Beyond the model, memory holds the streams, one layer's activations and one batch of logits; the layers' inputs are on disk.

    Args:
        seed: of the sampled labels.
        with_inputs: as of `collect_moments`.
        normalized_keys: also Fisher statistics at the normalized keys, of a family with QK-norm over heads.
        normalized: also `NormalizedStatistics`, keys weighted by the gradients at them.
        inputs: folder for the layers' inputs; None: a temporary one.

    Raises:
        CalibrationError: non-finite or zero gradients, with the layer named, or a forward that breaks autograd.
    """
    if inputs is None:
        with scratch() as inputs:
            collect_fisher(
                model, family, windows, sink, seed=seed, with_inputs=with_inputs, normalized=normalized,
                normalized_keys=normalized_keys, batch_size=batch_size, inputs=inputs, track=track,
            )  # fmt: skip
        return
    geometry = family.geometry(model.config.to_dict())
    _require_weights(model, family, ("k", "v", "o"))
    walk = LayerWalk(model, family, windows.batches(batch_size), inputs=inputs)
    at_norm = normalized_keys or normalized
    second_moments: list[list[Tensor]] = []
    layers = range(geometry.num_layers)
    for layer in track(layers, "Collecting moments", len(layers), unit="layers"):
        taps = [MomentsTap(layer, geometry, model.device, with_inputs=with_inputs)]
        taps += [MomentsTap(layer, geometry, model.device, normalized=True)] if at_norm else []
        _forward(walk, layer, taps)
        sink.write_layer(layer, taps[0].moments)
        second_moments.append([tap.moments.second_moment.cpu() for tap in taps])
    variates = label_variates(len(windows), windows.input_ids.shape[1], seed)

    def gradient(logits: Tensor, index: int) -> Tensor:
        rows = slice(index * batch_size, (index + 1) * batch_size)
        return sampled_gradient(logits, walk.batches[index].attention_mask.to(model.device), variates[rows])

    try:
        with walk.backward_sweep(gradient):
            for layer in track(reversed(layers), "Collecting Fisher statistics", len(layers), unit="layers"):
                _backward(walk, layer, second_moments[layer], sink, normalized=normalized)
    except CalibrationError as error:
        raise error if WITHOUT_FISHER in str(error) else CalibrationError(f"{error}; {WITHOUT_FISHER}") from error


def _forward(walk: LayerWalk, layer: int, taps: Sequence[Tap]) -> None:
    device, geometry = walk.model.device, walk.family.geometry(walk.model.config.to_dict())
    with attached(taps, walk.attention(layer), walk.family, geometry):
        walk.forward(layer, before=lambda index: announce(taps, walk.batches[index], device))


def _backward(walk: LayerWalk, layer: int, second_moments: Sequence[Tensor], sink: Sink, *, normalized: bool) -> None:
    """One layer's Fisher statistics, before its norm and, where there is a second moment for that, after it."""
    device, geometry = walk.model.device, walk.family.geometry(walk.model.config.to_dict())
    before_norm, *after_norm = second_moments
    plain = FisherTap(layer, geometry, device, before_norm)
    at_norm = [
        FisherTap(layer, geometry, device, moment, normalized=True, with_keys=normalized) for moment in after_norm
    ]
    queries = [NormalizedTap(layer, geometry, device, with_keys=False)] if normalized else []
    taps: list[Tap] = [plain, *at_norm, *queries]
    with attached(taps, walk.attention(layer), walk.family, geometry):
        walk.backward(layer, before=lambda index: announce(taps, walk.batches[index], device))
    for tap in (plain, *at_norm):
        tap.require_gradients()
    sink.write_fisher(layer, plain.fisher)
    for tap in at_norm:
        sink.write_normalized_fisher(layer, tap.fisher)
        for query in queries:
            sink.write_normalized(layer, query.statistics(tap.keys))


def _require_weights(model: Any, family: FamilySpec, projections: Sequence[Projection]) -> None:
    """Refuse projections that are all zero, which statistics would show as something else.

    Raises:
        CalibrationError: the tensor is named.
    """
    geometry = family.geometry(model.config.to_dict())
    for layer in range(geometry.num_layers):
        for projection in projections:
            name, rows = family.stored(projection, geometry)
            tensor = f"{family.attention_name(layer)}.{name}.weight"
            if not bool(model.get_parameter(tensor)[rows].any()):
                whole = "" if rows.start is None and rows.stop is None else f" in the rows of {projection}"
                because, instead = ZERO["o" if projection == "o" else "kv"]
                raise CalibrationError(f"layer {layer}: {tensor} is all zero{whole}: {because}; {instead}")
