"""care plan"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from care_mla import pipeline
from care_mla.checkpoint import at_revision
from care_mla.cli import options
from care_mla.cli.application import app
from care_mla.cli.terminal import console
from care_mla.pipeline import RankForecast
from care_mla.progress import rich_track

BARS = "▁▂▃▄▅▆▇█"


@app.command()
def plan(
    source: options.Source,
    revision: options.Revision = None,
    stats: Annotated[
        Path | None,
        typer.Option(
            "--stats", help="Statistics of `care calibrate`; without them, equal ranks from config.json alone."
        ),
    ] = None,
    kv_save: Annotated[
        str, typer.Option("--kv-save", help="Shares of the cache to save, comma-separated.")
    ] = "0.5,0.75,0.875",
    method: Annotated[
        str | None,
        typer.Option("--method", help="Comma-separated.  [default: a comparison of the best recipes and CARE]"),
    ] = None,
    layout: Annotated[
        str | None, typer.Option("--layout", help="With --method: split, joint or both.  [default: joint]")
    ] = None,
    ranks: Annotated[str | None, typer.Option("--ranks", help="With --method: as in `care convert`.")] = None,
    min_rank: options.MinRank = None,
    max_rank: options.MaxRank = None,
    rank_multiple: options.RankMultiple = None,
    plot: Annotated[Path, typer.Option("--plot", help="Where to draw it (.svg, .png or .pdf).")] = Path(
        "care_plan.svg"
    ),
    json_out: Annotated[Path | None, typer.Option("--json", help="Write ranks and predictions here too.")] = None,
) -> None:
    """Predicted loss increase and rank profile by budget and recipe; writes no model."""
    source = at_revision(source, revision)
    shares = options.numbers(kv_save, "--kv-save")
    options.require_json(json_out)
    if method is None and (layout is not None or ranks is not None):
        raise typer.BadParameter("--layout and --ranks choose the recipe together with --method")
    common = options.given(ranks=ranks, min_rank=min_rank, max_rank=max_rank, rank_multiple=rank_multiple)
    if stats is None:
        if method is not None or common:
            raise typer.BadParameter("--method and ranks other than equal ones need --stats")
        _plan_uniform(source, shares, json_out)
        return
    recipes: list[dict[str, Any]] | None = None
    if method is not None:
        layouts = (layout or "joint").split(",")
        recipes = [{"method": name, "layout": one} for name in method.split(",") for one in layouts]
    pipeline.require_plot(plot)
    forecasts = pipeline.plan_ranks(source, stats, kv_save=shares, recipes=recipes, track=rich_track, **common)
    terminal = console()
    for _, budgets in groupby(forecasts, key=lambda forecast: forecast.name):
        terminal.print(forecast_table(list(budgets)))
    terminal.print(
        "predicted: loss increase in nats per token, quadratic model, before any refit"
        if forecasts[0].predicted_loss_increase is not None
        else "no prediction: these statistics were collected without --fisher"
    )
    options.show_notes(forecasts[0].notes)
    if json_out is not None:
        pipeline.write_json(
            json_out, {"format": "care-mla forecasts 1", "forecasts": [forecast.to_dict() for forecast in forecasts]}
        )
    pipeline.plot_forecasts(source, forecasts, plot)
    terminal.print(f"plot: {plot}")


def _plan_uniform(source: str, shares: list[float], json_out: Path | None) -> None:
    """Budgets and equal ranks of a source that nothing is known of but its config.json."""
    facts = pipeline.inspect(source, shares)
    geometry = facts.geometry
    terminal = console()
    table = Table(title=f"Equal ranks in {geometry.num_layers} layers ({facts.dtype})", title_justify="left")
    for column in ("layout", "saved", "elements", "bytes", "rank of each latent"):
        table.add_column(column, justify="right", no_wrap=True)
    now = geometry.cache_elements_per_token
    table.add_row("today", "0.0%", str(now), str(now * facts.element_bytes), f"K, V: {geometry.kv_width}")
    plans = pipeline.plan_uniform(source, kv_save=shares)
    for plan in plans:
        elements = plan.cache_elements_per_token
        table.add_row(
            plan.layout,
            f"{100 * plan.kv_save(geometry):.1f}%",
            str(elements),
            str(elements * facts.element_bytes),
            ", ".join(map(str, plan.ranks[0])),
        )
    terminal.print(table)
    terminal.print("ranks by layer and predicted loss: care calibrate, then --stats")
    if json_out is not None:
        pipeline.write_json(json_out, {"format": "care-mla plans 1", "plans": [plan.to_dict() for plan in plans]})


def forecast_table(forecasts: list[RankForecast]) -> Table:
    """The budgets of one recipe; the profile is the cached width of each layer, as bars of the widest."""
    table = Table(title=forecasts[0].name, title_justify="left")
    for column in ("saved", "elements", "predicted", "widths", "profile"):
        table.add_column(column, justify="left" if column == "profile" else "right", no_wrap=True)
    for forecast in forecasts:
        widths = forecast.plan.cached_widths
        predicted = forecast.predicted_loss_increase
        table.add_row(
            f"{100 * forecast.kv_save:.1f}%",
            str(forecast.plan.cache_elements_per_token),
            "unknown" if predicted is None else f"{predicted:.4f}",
            f"{min(widths)}..{max(widths)}",
            _profile(widths),
        )
    return table


def _profile(widths: Sequence[int]) -> str:
    step = max(1, -(-len(widths) // 36))  # long models: the mean of neighbours
    means = [sum(part) / len(part) for part in (widths[i : i + step] for i in range(0, len(widths), step))]
    return "".join(BARS[min(len(BARS) - 1, int(len(BARS) * mean / max(means) - 1e-9))] for mean in means)
