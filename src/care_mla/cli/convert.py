"""care convert"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from care_mla import pipeline
from care_mla.checkpoint import at_revision
from care_mla.cli import options
from care_mla.cli.application import app
from care_mla.cli.heal import show_healing
from care_mla.cli.terminal import console
from care_mla.conversion.policy import LOW_BUDGET_FROM
from care_mla.methods import METHODS
from care_mla.progress import rich_meter, rich_track
from care_mla.ranks import ALLOCATORS


@app.command()
def convert(
    source: options.Source,
    out: options.Out,
    revision: options.Revision = None,
    stats: Annotated[
        Path | None, typer.Option("--stats", help="Statistics of `care calibrate`; otherwise calibrate now.")
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            "--layout",
            help="joint or split latent, RoPE kept whole; mla: one latent and a shared rotary key.  [default: joint]",
        ),
    ] = None,
    method: Annotated[str | None, typer.Option("--method", help=f"{', '.join(METHODS)}.  [default: fisher]")] = None,
    ranks: Annotated[
        str | None,
        typer.Option("--ranks", help=f"{', '.join(ALLOCATORS)}.  [default: fisher for method fisher, else uniform]"),
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", help="The paper's r, for K and for V; a joint latent gets 2r.")
    ] = None,
    kv_save: Annotated[float | None, typer.Option("--kv-save", help="Share of the cache to save, e.g. 0.5.")] = None,
    cache_elements: Annotated[
        int | None, typer.Option("--cache-elements", help="Cached elements per token, all layers.")
    ] = None,
    min_rank: options.MinRank = None,
    max_rank: options.MaxRank = None,
    rank_multiple: options.RankMultiple = None,
    shrinkage: Annotated[
        float | None, typer.Option("--shrinkage", help="Share of isotropic noise mixed into C.  [default: 0.01]")
    ] = None,
    fisher_exponent: Annotated[
        float | None,
        typer.Option(
            "--fisher-exponent",
            help=f"p of the tempered Fisher metric G^p.  [default: 0.8; 0.5 from {100 * LOW_BUDGET_FROM:g}% saving]",
        ),
    ] = None,
    fisher_shrinkage: Annotated[
        float | None, typer.Option("--fisher-shrinkage", help="Share of isotropic noise mixed into G.  [default: 0.02]")
    ] = None,
    centre: Annotated[
        bool | None,
        typer.Option(
            "--centre/--no-centre",
            help="Give means back as biases, or keep the source's biases only.  [default: centre]",
        ),
    ] = None,
    rope: Annotated[
        str | None,
        typer.Option("--rope", help="Layout mla: free, stock or transmla choice of the rotary pairs.  [default: free]"),
    ] = None,
    freq_fold: Annotated[
        int | None,
        typer.Option(
            "--freq-fold",
            help="With --rope stock or transmla: adjacent frequencies treated as one.  [default: 1, stock: at least 2]",
        ),
    ] = None,
    qk_rope_head_dim: Annotated[
        int | None,
        typer.Option(
            "--qk-rope-head-dim", help="Layout mla: width of the rotary key.  [default: of least predicted loss]"
        ),
    ] = None,
    context: Annotated[
        int | None, typer.Option("--context", help="Layout mla: positions attention must span.  [default: 8192]")
    ] = None,
    q_lora_rank: Annotated[
        int | None, typer.Option("--q-lora-rank", help="Layout mla: rank of the queries.  [default: exact queries]")
    ] = None,
    qk_norm: Annotated[
        str | None,
        typer.Option(
            "--qk-norm",
            help="Layout mla: exact, with a cached scale a kv head, or linear, a regression that stock classes can hold.  [default: exact]",
        ),
    ] = None,
    refit: Annotated[
        bool | None,
        typer.Option(
            "--refit/--no-refit",
            help=f"Refit output projections to the original's activations.  [default: fisher from {100 * LOW_BUDGET_FROM:g}% saving]",
        ),
    ] = None,
    refit_tokens: Annotated[
        int | None, typer.Option("--refit-tokens", help="Calibration tokens the refit reads.  [default: 8192]")
    ] = None,
    refit_ridge: Annotated[
        float | None, typer.Option("--refit-ridge", help="Pull toward the source's weights.  [default: 0.1]")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Of the written weights.  [default: the source's]")
    ] = None,
    calibration: options.Calibration = None,
    field: options.Field = None,
    samples: options.Samples = None,
    seqlen: options.Seqlen = None,
    seed: options.Seed = None,
    batch_size: options.BatchSize = None,
    pack: options.Pack = None,
    heal_tokens: Annotated[
        str | None,
        typer.Option(
            "--heal-tokens",
            help="Then train the converted model back toward the source on so many tokens, e.g. 64k: `care heal` with its defaults.",
        ),
    ] = None,
    heal_data: Annotated[
        str | None, typer.Option("--heal-data", help="Text to heal on.  [default: the calibration's]")
    ] = None,
    device: options.Device = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Convert a checkpoint; writes a loadable model, its manifest and a report."""
    source = at_revision(source, revision)
    recipe: dict[str, Any] = options.given(
        layout=layout,
        method=method,
        ranks=ranks,
        rank=rank,
        kv_save=kv_save,
        cache_elements=cache_elements,
        min_rank=min_rank,
        max_rank=max_rank,
        rank_multiple=rank_multiple,
        shrinkage=shrinkage,
        fisher_exponent=fisher_exponent,
        fisher_shrinkage=fisher_shrinkage,
        centre=centre,
        rope=rope,
        freq_fold=freq_fold,
        qk_rope_head_dim=qk_rope_head_dim,
        context=context,
        q_lora_rank=q_lora_rank,
        qk_norm=qk_norm,
        refit=refit,
        refit_tokens=refit_tokens,
        refit_ridge=refit_ridge,
        dtype=dtype,
    )
    text = options.given(
        calibration=calibration,
        field=field,
        samples=samples,
        seqlen=seqlen,
        seed=seed,
        batch_size=batch_size,
        pack=pack,
    )
    healing: dict[str, Any] = options.given(
        heal_tokens=options.count_of(heal_tokens, "--heal-tokens"), heal_data=heal_data
    )
    if heal_data is not None and heal_tokens is None:
        raise typer.BadParameter("--heal-data needs --heal-tokens")
    run: Callable[..., dict[str, Any]] = pipeline.convert
    interruptible: AbstractContextManager[None] = nullcontext()
    if healing:
        run = partial(pipeline.convert_and_heal, meter=rich_meter, **healing)
        interruptible = options.interruptible(lambda: pipeline.kept_after_interrupt(out))
    with interruptible:
        manifest = run(
            source, out, stats=stats, calibration=text, overwrite=overwrite, device=device, track=rich_track, **recipe
        )
    show_conversion(manifest, out)
    for record in manifest.get("healing", []):
        show_healing(record, out)


def recipe_name(recipe: dict[str, Any]) -> str:
    """What was done, in a line."""
    refit = ", output projections refitted" if recipe["refit"] else ""
    norm = ", linear QK-norm" if recipe["qk_norm"] == "linear" else ""
    queries = f", queries of rank {recipe['q_lora_rank']}" if recipe["q_lora_rank"] is not None else ""
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
    if recipe["layout"] == "mla":
        table.add_row("rotary key", _rotary_row(manifest))
    for block, name in (("k", "keys"), ("v", "values"), ("q", "queries")):
        errors = [layer["relative_error"][block] for layer in layers if block in layer["relative_error"]]
        if not errors:
            continue
        table.add_row(
            f"relative error of {name}",
            f"mean {sum(errors) / len(errors):.4f}, worst {max(errors):.4f} (layer {errors.index(max(errors))})",
        )
    if recipe["qk_norm"] == "linear":
        both = ", ".join(
            f"{name} {sum(layer['norm_error'][part] for layer in layers) / len(layers):.4f}"
            for part, name in (("q", "queries"), ("k", "keys"))
        )
        table.add_row("relative error of linear QK-norm", f"mean {both}")
    if manifest["predicted_loss_increase"] is not None:
        before = " (before the refit)" if recipe["refit"] else ""
        table.add_row("predicted loss increase", f"{manifest['predicted_loss_increase']:.4f} nats per token{before}")
    table.add_row("report", str(out / pipeline.REPORT))
    console().print(table)
    options.show_notes(manifest["notes"])
