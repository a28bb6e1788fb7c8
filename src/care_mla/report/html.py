"""Assembles the report."""

from __future__ import annotations

from functools import lru_cache
from math import exp
from typing import Any

from jinja2 import Environment, PackageLoader, Template, select_autoescape
from torch import Tensor

from care_mla.layouts import get_layout
from care_mla.report import figures


def render_report(
    manifest: dict[str, Any],
    energies: dict[str, Tensor],
    evaluations: list[dict[str, Any]],
    metrics: list[dict[str, Any]] | None = None,
) -> str:
    """One HTML page without external references.

    Args:
        manifest: of the conversion.
        energies: block name -> [layers, n] spectra.
        evaluations: results of `care eval`, possibly none.
        metrics: of the last healing, a record a step.
    """
    plan, geometry = manifest["plan"], manifest["source"]["geometry"]
    blocks = get_layout(plan["layout"]).blocks
    rope = plan.get("qk_rope_head_dim", 0)
    cached = [[*ranks, rope] if rope else ranks for ranks in plan["ranks"]]
    parity = 2 * geometry["num_kv_heads"] * geometry["head_dim"]
    manifest = {"predicted_loss_increase": None, "notes": [], **manifest}  # manifests of earlier versions have neither
    layers = manifest["layers"]
    compared = [e for e in evaluations if e["reference_loss"] is not None]
    measured = next(reversed(compared or evaluations), None)
    healings = manifest.get("healing", [])
    curve = None
    if healings and metrics:
        curve = figures.healing_curve([m for m in metrics if "kl" in m], healings[-1]["evaluations"])
    cache_figure = None
    if measured is not None:
        cache, reference = measured["cache"], measured["reference_cache"]
        original = reference["layer_widths"] if reference else None
        cache_figure = figures.cache_by_layer(cache["layer_widths"], original, cache["element_bytes"])
    return _page().render(
        manifest=manifest,
        geometry=geometry,
        recipe={key: value for key, value in manifest["recipe"].items() if value is not None},
        blocks=blocks,
        block_names=figures.BLOCK_NAMES,
        evaluations=evaluations,
        rank_figure=figures.rank_profile(cached, (*blocks, *(["rope"] if rope else [])), parity),
        spectrum_figures=[
            figures.spectra(energies[block], [ranks[index] for ranks in plan["ranks"]], block)
            for index, block in enumerate(blocks)
        ],
        error_figure=figures.layer_errors(layers),
        cache_figure=cache_figure,
        healings=healings,
        healing_rows=_before_and_after(healings[-1], evaluations) if healings else [],
        healing_figure=curve,
        measured=measured,
        loss_figure=None if manifest["predicted_loss_increase"] is None else figures.layer_losses(layers),
        refit_figure=figures.layer_refits(layers) if manifest["recipe"].get("refit") else None,
    )


@lru_cache
def _page() -> Template:
    """The template, compiled once."""
    environment = Environment(loader=PackageLoader("care_mla.report", "."), autoescape=select_autoescape(["jinja"]))
    return environment.get_template("report.html.jinja")


def _before_and_after(healing: dict[str, Any], evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of texts with what the one-shot and the healed model lose there, nats per token, and their perplexities."""
    before, after = healing["one_shot"], healing["healed"]
    rows = [
        {
            "text": f"held out of {healing['settings']['data'].split('/')[-1]}, {healing['text']['held_out_tokens']} tokens",
            "loss": (before["gap"], after["gap"]),
            "kl": (before["kl"], after["kl"]),
            "perplexity": tuple(exp(loss) for loss in (before["teacher_ce"], before["ce"], after["ce"])),
        }
    ]
    protocol = ("text", "field", "seqlen", "windows", "dtype", "device")
    compared = [e for e in healing["evaluations_before"] if e["reference_perplexity"] is not None]
    for new in evaluations:
        # Evaluations of earlier versions say less, and are compared by what both say.
        same = (e for e in compared if all(e[key] == new[key] for key in protocol if key in e and key in new))
        old = next(same, None)
        if old is None or new["reference_perplexity"] is None:
            continue
        rows.append(
            {
                "text": f"{new['text'].split('/')[-1]}, {new['windows']} × {new['seqlen']} tokens",
                "loss": (old["loss_increase"], new["loss_increase"]),
                "kl": (old["kl"], new["kl"]),
                "perplexity": (new["reference_perplexity"], old["perplexity"], new["perplexity"]),
            }
        )
    return rows
