"""Draws docs/results/cache-against-loss.svg from benchmarks/results: `python docs/make_figure.py`.

Cache of one sequence of 32k tokens of SmolLM2-135M in bfloat16 against nats lost per token on the first 8 x 512 tokens of WikiText-2 test.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from make_results import read
from matplotlib.figure import Figure

FIGURE = Path(__file__).parent / "results" / "cache-against-loss.svg"
ELEMENTS, CONTEXT, BYTES = 11520, 32768, 2
"""Cached elements per token of the original, tokens, and bytes of an element."""
Points = list[tuple[float, float]]


def gigabytes(share: float) -> float:
    """Of a cache that keeps a share of the original's bytes."""
    return share * ELEMENTS * CONTEXT * BYTES / 1e9


def lines() -> dict[str, Points]:
    """Label -> (share of the cache kept, nats lost)."""
    fidelity = {row["key"]: row["losses"]["wikitext2 512"] for row in read("fidelity")["rows"]}
    healed = {row["key"]: row["after"]["loss_increase"] for row in read("heal")["rows"]}
    mla = {row["key"]: row["losses"]["512"] for row in read("true_mla")["rows"]}

    def converted(recipe: str) -> Points:
        return [
            (1 - kv_save, fidelity[f"wikitext2 42 {kv_save} {recipe}"] - fidelity["original"])
            for kv_save in (0.5, 0.75, 0.875)
        ]

    def true_mla(recipe: str) -> Points:
        names = ((0.5, "50% saved, rotary key of 64"), (0.25, "75% saved, rotary key of 32"))
        return [(kept, mla[f"wikitext2, {budget}, {recipe}"] - mla["original"]) for kept, budget in names]

    return {
        "CARE as in its paper": converted("care-u"),
        "TransMLA": true_mla("transmla, FreqFold 2"),
        "care-mla, layout mla": true_mla("stock"),
        "care-mla, the default": converted("default"),
        "the same, healed with 0.25M tokens": [(0.25, healed["75%, 0.25M"]), (0.125, healed["87.5%, lr 3e-3, 0.25M"])],
    }


def draw() -> Figure:
    figure = Figure(figsize=(7.4, 4.0), layout="constrained")
    axes = figure.subplots()
    styles = {
        "CARE as in its paper": ("#9ca3af", "s-"),
        "TransMLA": ("#c4b5fd", "s-"),
        "care-mla, layout mla": ("#7c3aed", "o-"),
        "care-mla, the default": ("#0f766e", "o-"),
        "the same, healed with 0.25M tokens": ("#0f766e", "o--"),
    }
    for label, points in lines().items():
        color, style = styles[label]
        axes.plot(
            [gigabytes(kept) for kept, _ in points], [lost for _, lost in points], style, color=color, label=label
        )
    names = {"int4, keys by channel": "int4 (KIVI)", "fp8": "fp8", "int8": "int8", "int4": "int4", "int3": "int3"}
    quantized = [row for row in read("quantized_cache")["rows"] if row["cache"] in names]
    axes.plot(
        [gigabytes(row["bits"] / 16) for row in quantized],
        [row["loss_increase"] for row in quantized],
        "D",
        color="#d97706",
        label="plain quantized caches",
    )
    for row in quantized:
        place = (gigabytes(row["bits"] / 16), row["loss_increase"])
        axes.annotate(names[row["cache"]], place, (6, 4), textcoords="offset points", fontsize=8, color="#92400e")
    original = gigabytes(1.0)
    axes.axvline(original, color="#111827", linestyle=":")
    axes.annotate("original", (original, 1.0), (-6, 0), textcoords="offset points", ha="right", fontsize=8)
    axes.set(yscale="log", ylim=(4e-4, 4), xlim=(0, 0.8))
    axes.set(xlabel="GB of cache at 32k tokens", ylabel="nats lost per token")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="lower right", bbox_to_anchor=(0.99, 0.02))
    return figure


if __name__ == "__main__":
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "care-mla", "font.family": "sans-serif"}):
        draw().savefig(FIGURE, metadata={"Date": None})
