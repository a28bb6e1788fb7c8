"""care plan"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import care_mla
from care_mla.cli import options
from care_mla.cli.adapter import options_from
from care_mla.cli.application import app
from care_mla.cli.tables import show_equal_ranks, show_forecasts
from care_mla.cli.terminal import quoted, say
from care_mla.config import PLANNED, PlanSettings, Recipe

BOUNDS = {"min_rank", "max_rank", "rank_multiple"}
"""Fields of the recipe with which a comparison stays one."""


@app.command(
    epilog=options.examples(
        "care plan MODEL",
        "care plan MODEL --stats stats --kv-save 0.25,0.5,0.75",
        "care plan MODEL --stats stats --layout joint,mla --method fisher --rope stock",
    )
)
@options_from(only={"recipe": PLANNED}, plan=PlanSettings, recipe=Recipe)
def plan(
    source: options.Source,
    stats: Annotated[
        Path | None,
        typer.Option(
            "--stats",
            help="Statistics of `care calibrate`.",
            show_default="equal ranks, from config.json alone",
            metavar="DIR",
        ),
    ] = None,
    plot: Annotated[Path, typer.Option("--plot", help="Where to draw it (.svg, .png or .pdf).", metavar="FILE")] = Path(
        "care_plan.svg"
    ),
    json_out: options.Json = None,
    revision: options.Revision = None,
    *,
    settings: dict[str, dict[str, Any]],
) -> None:
    """Predicted loss increase and rank profile by budget and recipe; writes no model."""
    from care_mla.checkpoint import at_revision
    from care_mla.files import write_json
    from care_mla.pipeline import plot_forecasts, require_plot
    from care_mla.progress import rich_track

    source = at_revision(source, revision)
    asked, common = PlanSettings.make(**settings["plan"]), settings["recipe"]
    shares = options.numbers(asked.kv_save, "--kv-save")
    options.require_json(json_out)
    recipes: list[dict[str, Any]] | None = None
    if asked.method is not None or asked.layout is not None or not common.keys() <= BOUNDS:
        methods, layouts = (asked.method or "fisher").split(","), (asked.layout or "joint").split(",")
        recipes = [{"method": name, "layout": one} for name in methods for one in layouts]
    if stats is None:
        if recipes is not None or common:
            raise typer.BadParameter(
                "a recipe (--layout, --method, --ranks, ...) is predicted from statistics: give --stats"
            )
        plans = care_mla.plan_uniform(source, kv_save=shares)
        show_equal_ranks(care_mla.inspect(source, shares), plans)
        if json_out is not None:
            write_json(json_out, {"format": "care-mla plans 1", "plans": [plan.to_dict() for plan in plans]})
        options.show_next(f"care calibrate {quoted(source)} --out STATS, then care plan {quoted(source)} --stats STATS")
        return
    require_plot(plot)
    forecasts = care_mla.plan_ranks(source, stats, kv_save=shares, recipes=recipes, track=rich_track, **common)
    show_forecasts(forecasts)
    if json_out is not None:
        write_json(json_out, {"format": "care-mla forecasts 1", "forecasts": [one.to_dict() for one in forecasts]})
    plot_forecasts(source, forecasts, plot)
    say(f"plot: {plot}")
    options.show_next(f"care convert {quoted(source)} --stats {quoted(stats)} --kv-save {shares[0]:g} --out OUT")
