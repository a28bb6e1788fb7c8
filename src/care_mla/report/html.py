"""Assembles the report."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from torch import Tensor

from care_mla.ranks.plan import BLOCKS
from care_mla.report import figures


def render_report(manifest: dict[str, Any], energies: dict[str, Tensor], evaluations: list[dict[str, Any]]) -> str:
    """One HTML page without external references.

    Args:
        manifest: of the conversion.
        energies: block name -> [layers, n] spectra.
        evaluations: results of `care eval`, possibly none.
    """
    plan, geometry = manifest["plan"], manifest["source"]["geometry"]
    blocks = BLOCKS[plan["layout"]]
    rope = plan.get("qk_rope_head_dim", 0)
    cached = [[*ranks, rope] if rope else ranks for ranks in plan["ranks"]]
    parity = 2 * geometry["num_kv_heads"] * geometry["head_dim"]
    environment = Environment(loader=PackageLoader("care_mla.report", "."), autoescape=select_autoescape(["jinja"]))
    manifest = {"predicted_loss_increase": None, "notes": [], **manifest}  # manifests of earlier versions have neither
    layers = manifest["layers"]
    measured = evaluations[-1] if evaluations else None
    cache_figure = None
    if measured is not None:
        cache, reference = measured["cache"], measured["reference_cache"]
        original = reference["layer_widths"] if reference else None
        cache_figure = figures.cache_by_layer(cache["layer_widths"], original, cache["element_bytes"])
    return environment.get_template("report.html.jinja").render(
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
        measured=measured,
        loss_figure=None if manifest["predicted_loss_increase"] is None else figures.layer_losses(layers),
        refit_figure=figures.layer_refits(layers) if manifest["recipe"].get("refit") else None,
    )
