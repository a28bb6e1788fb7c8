"""care evaluate"""

from __future__ import annotations

from typing import Annotated, Any

import typer

import care_mla
from care_mla.cli import options
from care_mla.cli.adapter import options_from
from care_mla.cli.application import app
from care_mla.cli.tables import evaluation_table
from care_mla.cli.terminal import console, quoted
from care_mla.config import EvaluationSettings


@app.command("eval", hidden=True)
@app.command(
    "evaluate",
    epilog=options.examples(
        "care evaluate OUT --reference MODEL --text test.txt",
        "care evaluate OUT --reference MODEL --text wikitext2 --windows 64 --json result.json",
    ),
)
@options_from(settings=EvaluationSettings)
def evaluate(
    model: Annotated[str, typer.Argument(help="Converted model, or any model.", metavar="DIR")],
    text: Annotated[
        str,
        typer.Option(
            "--text", help="Text file, records file, or named corpus: wikitext2, c4, ptb, alpaca.", metavar="SPEC"
        ),
    ],
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            help="The unconverted model; of a hub id NAME@REVISION, too.",
            show_default="not compared",
            metavar="NAME",
        ),
    ] = None,
    json_out: options.Json = None,
    revision: options.Revision = None,
    device: options.Device = None,
    dtype: options.DType = "auto",
    *,
    settings: dict[str, dict[str, Any]],
) -> None:
    """Perplexity, KL to the reference, and the cache measured on the live cache object."""
    from care_mla.checkpoint import at_revision
    from care_mla.files import write_json
    from care_mla.progress import rich_track

    options.require_json(json_out)
    result = care_mla.evaluate(
        at_revision(model, revision),
        text,
        reference=reference,
        device=device,
        dtype=dtype,
        track=rich_track,
        **settings["settings"],
    )
    if json_out is not None:
        write_json(json_out, {"format": "care-mla evaluation 1", **result})
    ran = f"{result['windows']} x {result['seqlen']} tokens, {result['dtype']} on {result['device']}"
    console().print(evaluation_table(result, title=f"{model} on {text}, {ran}"))
    options.show_notes(result["notes"])
    if result["reference_loss"] is not None and not result["notes"]:
        options.show_next(f"care report {quoted(model)}")
