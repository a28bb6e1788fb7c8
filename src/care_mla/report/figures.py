"""Figures of the report as inline SVG."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

if TYPE_CHECKING:
    from care_mla.ranks import RankForecast

BLOCK_NAMES = {"k": "keys", "v": "values", "kv": "keys and values", "rope": "rotary key"}
COLORS = {"k": "#2563eb", "v": "#ea580c", "kv": "#0f766e", "rope": "#7c3aed"}
_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "svg.fonttype": "none",
    "svg.hashsalt": "care-mla",
}


def _svg(draw: Callable[[Axes], None], *, width: float = 7.2, height: float = 2.9) -> str:
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(width, height))
        figure.subplots_adjust(
            left=0.09, right=0.99, bottom=0.16, top=0.91
        )  # a fixed frame draws once; a computed one, twice
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def drawn(figure: Figure, kind: str) -> bytes:
    """A figure as a file of kind svg, png or pdf, which says that care drew it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, metadata={"Software" if kind == "png" else "Creator": "care-mla"})
    plt.close(figure)
    return buffer.getvalue()


def rank_profile(ranks: Sequence[Sequence[int]], blocks: Sequence[str], parity: int) -> str:
    """Latent width by layer, stacked over blocks, against KV parity."""

    def draw(axes: Axes) -> None:
        layers = range(len(ranks))
        below = [0] * len(ranks)
        for index, block in enumerate(blocks):
            heights = [layer[index] for layer in ranks]
            axes.bar(layers, heights, bottom=below, color=COLORS[block], label=BLOCK_NAMES[block], width=0.8)
            below = [b + h for b, h in zip(below, heights, strict=True)]
        axes.axhline(parity, color="#6b7280", linestyle="--", linewidth=1, label="unconverted cache")
        axes.set(xlabel="layer", ylabel="cached elements per token", ylim=(0, 1.3 * parity))
        axes.legend(loc="upper right", ncols=3, fontsize=8)

    return _svg(draw)


def forecast(forecasts: Sequence[RankForecast], parity: int) -> Figure:
    """Predicted loss increase against saving, one line a recipe; below, the first recipe's cached widths by layer."""
    with plt.rc_context(_STYLE):
        figure, (loss, profile) = plt.subplots(2, 1, figsize=(7.2, 6.4), layout="constrained")
        for name, group in groupby(forecasts, key=lambda f: f.name):
            points = [(100 * f.kv_save, f.predicted_loss_increase) for f in group]
            known = sorted((x, y) for x, y in points if y is not None)
            if known:
                loss.semilogy(*zip(*known, strict=True), "o-", markersize=4, linewidth=1.2, label=name)
        loss.set(xlabel="KV cache saved, %", ylabel="predicted loss increase, nats per token")
        if loss.lines:
            loss.legend(fontsize=8)
        else:
            loss.text(0.5, 0.5, "no Fisher statistics: no prediction", ha="center", transform=loss.transAxes)
        for f in (f for f in forecasts if f.name == forecasts[0].name):
            widths = f.plan.cached_widths
            profile.step(range(len(widths)), widths, where="mid", label=f"{100 * f.kv_save:.1f}% saved")
        profile.axhline(parity, color="#6b7280", linestyle="--", linewidth=1, label="unconverted cache")
        profile.set(
            xlabel="layer",
            ylabel="cached elements per token",
            ylim=(0, 1.25 * parity),
            title=forecasts[0].name,
        )
        profile.legend(fontsize=8, ncols=2, loc="upper right")
    return figure


def spectra(energies: Tensor, ranks: Sequence[int], block: str) -> str:
    """Energy left after r directions, one line a layer (dark: early), a dot where the layer was cut."""

    def draw(axes: Axes) -> None:
        count = len(energies)
        colors = plt.get_cmap("viridis")([i / max(1, count - 1) for i in range(count)])
        for layer, row in enumerate(energies.double()):
            total = row.sum().clamp_min(1e-300)  # a layer of zeros drops nothing
            left = (row.flip(0).cumsum(0).flip(0) / total).clamp_min(1e-12)
            axes.semilogy(range(len(row)), left, color=colors[layer], linewidth=0.8)
            cut = ranks[layer]
            if cut < len(row):
                axes.semilogy([cut], [left[cut]], "o", color=colors[layer], markersize=3)
        axes.set(
            xlabel="rank",
            ylabel="share of energy dropped",
            ylim=(1e-6, 1.5),
            title=f"{BLOCK_NAMES[block]} (dark: first layers)",
        )

    return _svg(draw)


def layer_errors(layers: Sequence[dict[str, Any]]) -> str:
    """Relative squared error of rebuilt keys and values on the calibration text."""
    lines = {BLOCK_NAMES[b]: (COLORS[b], [layer["relative_error"][b] for layer in layers]) for b in ("k", "v")}
    return _by_layer(lines, "E|y - y'|² / E|y|²")


def layer_refits(layers: Sequence[dict[str, Any]]) -> str:
    """Relative error of the attention's contribution to the residual stream, before and after the refit."""
    colors = {"before": "#6b7280", "after": "#0f766e"}
    lines = {name: (color, [layer["output_error"][name] for layer in layers]) for name, color in colors.items()}
    return _by_layer(lines, "E|t - W a|² / E|t|²")


def _by_layer(lines: dict[str, tuple[str, list[float]]], label: str) -> str:
    def draw(axes: Axes) -> None:
        for name, (color, values) in lines.items():
            shown = [max(value, 1e-12) for value in values]
            axes.semilogy(range(len(shown)), shown, "o-", color=color, markersize=3, linewidth=1, label=name)
        axes.set(xlabel="layer", ylabel=label)
        axes.legend(fontsize=8)

    return _svg(draw)


def layer_losses(layers: Sequence[dict[str, Any]]) -> str:
    """Predicted loss increase of every layer, in thousandths of a nat."""

    def draw(axes: Axes) -> None:
        millinats = [1000 * layer["predicted_loss_increase"] for layer in layers]  # short tick labels fit the frame
        axes.bar(range(len(layers)), millinats, color="#0f766e", width=0.8)
        axes.set(xlabel="layer", ylabel="0.001 nats per token")

    return _svg(draw)


def healing_curve(steps: Sequence[dict[str, float]], evaluations: Sequence[dict[str, float]]) -> str:
    """KL to the teacher against tokens: every training step, and held-out text."""

    def draw(axes: Axes) -> None:
        axes.plot(
            [s["tokens"] for s in steps], [s["kl"] for s in steps], color="#d1d5db", linewidth=1, label="training step"
        )
        tokens = [e["tokens"] for e in evaluations]
        axes.plot(
            tokens, [e["kl"] for e in evaluations], "o-", color="#0f766e", markersize=4, label="held-out text: KL"
        )
        gaps = [e["gap"] for e in evaluations]
        axes.plot(tokens, gaps, "o--", color="#ea580c", markersize=4, label="held-out text: loss increase")
        axes.axhline(0.0, color="#6b7280", linewidth=0.8)
        axes.set(xlabel="tokens", ylabel="nats per token")
        axes.legend(fontsize=8)

    return _svg(draw)


def cache_by_layer(converted: Sequence[float], original: Sequence[float] | None, element_bytes: int) -> str:
    """Bytes per token and layer as measured on the live cache objects."""

    def draw(axes: Axes) -> None:
        layers = range(len(converted))
        if original is not None:
            axes.bar(layers, [w * element_bytes for w in original], color="#d1d5db", label="original", width=0.8)
        axes.bar(layers, [w * element_bytes for w in converted], color="#0f766e", label="converted", width=0.8)
        axes.set(xlabel="layer", ylabel="bytes per token", ylim=(0, 1.3 * element_bytes * max(original or converted)))
        axes.legend(loc="upper right", ncols=2, fontsize=8)

    return _svg(draw)
