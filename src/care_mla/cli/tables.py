"""Results as tables of the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from care_mla.cli.options import show_notes
from care_mla.cli.terminal import console

if TYPE_CHECKING:
    from care_mla.export.engines import EngineVerdict
    from care_mla.pipeline import Inspection
    from care_mla.ranks import RankForecast, RankPlan

BARS = "▁▂▃▄▅▆▇█"
CONTEXT = 32768
"""Tokens that a cache in GB is told for."""


def gigabytes(bytes_per_token: float, tokens: int = CONTEXT) -> str:
    """Cache of one sequence, in GB of 1e9 bytes."""
    size = bytes_per_token * tokens / 1e9
    return f"{size:.3g} GB"


def nats(increase: float) -> str:
    """A loss increase, and what it does to perplexity."""
    return f"{increase:.4f} nats ({100 * math.expm1(increase):+.1f}% perplexity)"


def recipe_name(recipe: dict[str, Any]) -> str:
    """What was done, in a line."""
    refit = ", output projections refitted" if recipe.get("refit") else ""
    norm = ", linear QK-norm" if recipe.get("qk_norm") == "linear" else ""
    queries = f", queries of rank {recipe['q_lora_rank']}" if "q_lora_rank" in recipe else ""
    return f"{recipe['method']}, {recipe['layout']} latent, {recipe['ranks']} ranks{norm}{queries}{refit}"


def _rotary_row(manifest: dict[str, Any]) -> str:
    """The rotary width, and what other widths were predicted to lose."""
    others = ", ".join(
        f"{width}: {lost['rotation']:.3f} + {lost['latent']:.3f}"
        for width, lost in manifest["predicted_by_rotary_width"].items()
    )
    return f"{manifest['recipe']['qk_rope_head_dim']}" + (
        f" (nats by width, rotation + latent: {others})" if others else ""
    )


def show_conversion(manifest: dict[str, Any], out: Path) -> None:
    """One table: what was asked for and what it saves."""
    from care_mla.pipeline import REPORT

    table = Table(title=f"{manifest['source']['name']} -> {out}", show_header=False)
    recipe, layers = manifest["recipe"], manifest["layers"]
    widths = [sum(layer["ranks"]) for layer in layers]
    table.add_row("recipe", recipe_name(recipe))
    table.add_row(
        "cached elements per token",
        f"{manifest['source_cache_elements_per_token']} -> {manifest['cache_elements_per_token']}",
    )
    table.add_row("KV cache saved", f"{100 * manifest['kv_save']:.1f}%")
    table.add_row("latent width by layer", f"{min(widths)}..{max(widths)}")
    if "qk_rope_head_dim" in recipe:
        table.add_row("rotary key", _rotary_row(manifest))
    for block, name in (("k", "keys"), ("v", "values"), ("q", "queries")):
        errors = [layer["relative_error"][block] for layer in layers if block in layer["relative_error"]]
        if not errors:
            continue
        table.add_row(
            f"relative error of {name}",
            f"mean {sum(errors) / len(errors):.4f}, worst {max(errors):.4f} (layer {errors.index(max(errors))})",
        )
    if recipe.get("qk_norm") == "linear":
        both = ", ".join(
            f"{name} {sum(layer['norm_error'][part] for layer in layers) / len(layers):.4f}"
            for part, name in (("q", "queries"), ("k", "keys"))
        )
        table.add_row("relative error of linear QK-norm", f"mean {both}")
    if manifest["predicted_loss_increase"] is not None:
        before = " (before the refit)" if recipe.get("refit") else ""
        table.add_row(
            "predicted loss increase",
            f"{nats(manifest['predicted_loss_increase'])} on text like the calibration's{before}",
        )
    table.add_row("report", str(out / REPORT))
    console().print(table)
    show_notes(manifest["notes"])


def show_healing(record: dict[str, Any], out: Path) -> None:
    """What the held-out text lost before and after, and how it was trained."""
    table = Table(title=f"{record['model']['name']} -> {out}")
    table.add_column("held-out text, nats per token")
    before, after = record["one_shot"], record["healed"]
    for column in ("before", "healed", "teacher"):
        table.add_column(column, justify="right")
    table.add_row("KL to the teacher", f"{before['kl']:.4f}", f"{after['kl']:.4f}", "0")
    table.add_row("cross entropy", f"{before['ce']:.4f}", f"{after['ce']:.4f}", f"{before['teacher_ce']:.4f}")
    console().print(table)
    stopped = ", stopped early: the gap no longer closed" if record["stopped_early"] else ""
    skipped = f", {record['skipped']} steps skipped (not finite)" if record["skipped"] else ""
    console().print(
        f"{record['tokens']:,} tokens, {record['tokens_per_second']:.0f} a second, best at step {record['best_step']} of {record['step']}{stopped}{skipped}",
        soft_wrap=True,
    )


def evaluation_table(result: dict[str, Any], *, title: str) -> Table:
    """Model and reference side by side."""
    table = Table(title=title)
    table.add_column("")
    table.add_column("converted" if result["reference_loss"] is not None else "model", justify="right")
    reference = result["reference_cache"]
    if reference is not None:
        table.add_column("original", justify="right")
    rows = [
        ("perplexity", f"{result['perplexity']:.3f}", f"{result['reference_perplexity'] or 0:.3f}"),
        ("loss, nats per token", f"{result['loss']:.4f}", f"{result['reference_loss'] or 0:.4f}"),
        (
            "cache elements per token",
            f"{result['cache']['elements_per_token']:.0f}",
            f"{reference['elements_per_token']:.0f}" if reference else "",
        ),
        (
            "cache bytes per token, measured",
            f"{result['cache']['bytes_per_token']:.0f}",
            f"{reference['bytes_per_token']:.0f}" if reference else "",
        ),
    ]
    for name, mine, theirs in rows:
        table.add_row(name, mine, *([theirs] if reference is not None else []))
    if reference is not None:
        table.add_section()
        table.add_row("loss increase, nats per token", f"{result['loss_increase']:+.4f}", "")
        table.add_row("KL(original || converted), nats", f"{result['kl']:.4f}", "")
        table.add_row("top-1 agreement", f"{100 * result['top1_agreement']:.1f}%", "")
    return table


def show_equal_ranks(facts: Inspection, plans: Sequence[RankPlan]) -> None:
    """Budgets and equal ranks of a source that nothing is known of but its config.json."""
    geometry = facts.geometry
    table = Table(title=f"Equal ranks in {geometry.num_layers} layers ({facts.dtype})", title_justify="left")
    for column in ("layout", "saved", "elements", "bytes", f"GB at {CONTEXT // 1024}k", "rank of each latent"):
        table.add_column(column, justify="right", no_wrap=True)
    now = geometry.cache_elements_per_token

    def row(name: str, saved: float, elements: int, ranks: str) -> None:
        size = elements * facts.element_bytes
        table.add_row(name, f"{100 * saved:.1f}%", str(elements), str(size), gigabytes(size)[:-3], ranks)

    row("today", 0.0, now, f"K, V: {geometry.kv_width}")
    for plan in plans:
        row(plan.layout.name, plan.kv_save(geometry), plan.cache_elements_per_token, ", ".join(map(str, plan.ranks[0])))
    console().print(table)


def show_forecasts(forecasts: Sequence[RankForecast]) -> None:
    """A table a recipe, and what a prediction is."""
    terminal = console()
    for _, budgets in groupby(forecasts, key=lambda forecast: forecast.name):
        terminal.print(forecast_table(list(budgets)))
    terminal.print(
        "predicted: loss increase in nats per token on text like the calibration's, quadratic model, before any refit;\n"
        "other text loses more: measure it with care evaluate"
        if forecasts[0].predicted_loss_increase is not None
        else "no prediction: these statistics hold no Fisher statistics (calibrated with --no-fisher)"
    )
    show_notes(forecasts[0].notes)


def forecast_table(forecasts: list[RankForecast]) -> Table:
    """The budgets of one recipe; the profile is the cached width of each layer, as bars of the widest."""
    table = Table(title=forecasts[0].name, title_justify="left")
    for column in ("saved", "elements", "predicted", "perplexity", "widths", "profile"):
        table.add_column(column, justify="left" if column == "profile" else "right", no_wrap=True)
    for forecast in forecasts:
        widths = forecast.plan.cached_widths
        predicted = forecast.predicted_loss_increase
        table.add_row(
            f"{100 * forecast.kv_save:.1f}%",
            str(forecast.plan.cache_elements_per_token),
            "unknown" if predicted is None else f"{predicted:.4f}",
            "" if predicted is None else f"{100 * math.expm1(predicted):+.1f}%",
            f"{min(widths)}..{max(widths)}",
            _profile(widths),
        )
    return table


def _profile(widths: Sequence[int]) -> str:
    step = max(1, -(-len(widths) // 30))  # long models: the mean of neighbours
    means = [sum(part) / len(part) for part in (widths[i : i + step] for i in range(0, len(widths), step))]
    return "".join(BARS[min(len(BARS) - 1, int(len(BARS) * mean / max(means) - 1e-9))] for mean in means)


def show_export(record: dict[str, Any], converted: Path, out: Path) -> None:
    """What class was written, and what it caches."""
    table = Table(title=f"{converted} -> {out}", show_header=False)
    table.add_row("class", record["architecture"])
    table.add_row("cache of a layer", f"latent {record['kv_lora_rank']} + rotary key {record['qk_rope_head_dim']}")
    table.add_row("cached elements per token", f"{record['cache_elements_per_token']}")
    table.add_row("KV cache saved", f"{100 * record['kv_save']:.1f}%")
    console().print(table)
    show_notes(record["notes"])


def show_inspection(facts: Inspection, source: str) -> None:
    """What a source is, what it caches, and what a conversion must keep of it."""
    geometry = facts.geometry
    table = Table(title=f"{source}: {facts.architecture}", show_header=False)
    table.add_row(
        "attention",
        f"{geometry.attention_kind}, {geometry.num_heads} query heads over {geometry.num_kv_heads} key/value heads of {geometry.head_dim}",
    )
    table.add_row("layers, hidden size", f"{geometry.num_layers}, {geometry.hidden_size}")
    table.add_row("KV parity", f"rank {geometry.kv_width} for K and V, joint {2 * geometry.kv_width}")
    terminal = console()
    terminal.print(table)

    cache = Table(title=f"KV cache ({facts.dtype}), GiB for a batch of {facts.batch}", title_justify="left")
    lengths = list(facts.budgets[0].cache_gib)
    for column in ("saved", "elements a token", "--rank", *(f"{tokens // 1024}k" for tokens in lengths)):
        cache.add_column(column, justify="right", no_wrap=True)
    for row in facts.budgets:
        sizes = [f"{row.cache_gib[tokens]:.3g}" for tokens in lengths]
        cache.add_row(f"{100 * row.kv_save:.1f}%", str(row.elements), f"{row.rank:g}", *sizes)
    terminal.print(cache)
    if any(feature == "sliding window" for feature, *_ in facts.features):
        show_notes(["layers with a window cache no more than it, so what is cached at long lengths is less than this"])

    kept = Table(title="Features a conversion must keep")
    for column in ("feature", "in this model", "layouts split, joint", "layout mla"):
        kept.add_column(column)
    for feature in facts.features:
        kept.add_row(*feature)
    terminal.print(kept if facts.features else "No feature beyond plain attention with RoPE; all layouts express it.")
    terminal.print(_engine_table(facts.engines))


def _engine_table(verdicts: Sequence[EngineVerdict]) -> Table:
    """Which engine can run a conversion, how much it can save there, and what that takes or what stands against it."""
    table = Table(title="Engines", title_justify="left")
    for column in ("engine", "runs it", "can save", "with, or why not"):
        table.add_column(column)
    for one in verdicts:
        savings = "any share" if one.savings is None else " or ".join(f"{100 * share:.1f}%" for share in one.savings)
        how = "; ".join(one.reasons) or " ".join(one.needs) or "any layout"
        how += f" ({one.tried})" if one.able else ""
        table.add_row(one.title, "yes" if one.able else "no", savings if one.able else "", how)
    return table
