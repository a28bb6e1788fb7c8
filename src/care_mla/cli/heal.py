"""care heal"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from care_mla import pipeline
from care_mla.checkpoint import at_revision
from care_mla.cli import options
from care_mla.cli.application import app
from care_mla.cli.terminal import console
from care_mla.progress import rich_meter, rich_track


@app.command()
def heal(
    model: Annotated[str, typer.Argument(help="Directory of `care convert` or `care export`.", metavar="DIR")],
    out: options.Out,
    teacher: Annotated[
        str | None,
        typer.Option("--teacher", help="Model directory or hub id.  [default: what the model was converted from]"),
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch, tag or commit of --teacher; as good as NAME@REVISION.")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option("--tokens", help="Budget, e.g. 64k, 0.25M, 250000.  [default: 64k]")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="Training text, as --calibration of `care calibrate`; corpora of the hub are streamed.  [default: self]",
        ),
    ] = None,
    field: options.Field = None,
    train: Annotated[
        str | None,
        typer.Option(
            "--train", help="kv: the factors of keys and values; attention: whole attentions; all.  [default: kv]"
        ),
    ] = None,
    seqlen: Annotated[int | None, typer.Option("--seqlen", help="Tokens in a block.  [default: 256]")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Blocks in a step, over all processes.  [default: 1]")
    ] = None,
    micro_batch_size: Annotated[
        int | None,
        typer.Option("--micro-batch-size", help="Blocks in one forward pass of a process.  [default: its whole share]"),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            "--lr",
            help="Highest learning rate: by what share a step changes what a weight gives.  [default: kv 1.5e-3, attention 1e-3, all 5e-4]",
        ),
    ] = None,
    warmup: Annotated[
        float | None, typer.Option("--warmup", help="Share of the steps in which it rises.  [default: 0.05]")
    ] = None,
    weight_decay: Annotated[float | None, typer.Option("--weight-decay", help="Of AdamW.  [default: 0]")] = None,
    clip: Annotated[float | None, typer.Option("--clip", help="Largest norm of the gradient.  [default: 1]")] = None,
    kl_weight: Annotated[
        float | None, typer.Option("--kl-weight", help="beta of CE + beta tau^2 KL (Eq. 6-8).  [default: 1]")
    ] = None,
    ce_weight: Annotated[
        float | None, typer.Option("--ce-weight", help="Weight of the cross entropy.  [default: 0]")
    ] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", help="tau.  [default: 1]")] = None,
    teacher_top_k: Annotated[
        int | None,
        typer.Option("--teacher-top-k", help="Run the teacher once, and keep so many probabilities a token on disk."),
    ] = None,
    teacher_logits: Annotated[
        Path | None, typer.Option("--teacher-logits", help="Where these stay, for other runs on the same text.")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision", help="float32 or bfloat16 products.  [default: bfloat16 where the hardware has it]"
        ),
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option("--gradient-checkpointing", help="Less memory, a third more time."),
    ] = None,
    shard: Annotated[
        bool | None, typer.Option("--shard", help="Several processes: shard the model over them (FSDP2).")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of held-out blocks and order.  [default: 42]")] = None,
    eval_blocks: Annotated[
        int | None, typer.Option("--eval-blocks", help="Blocks held out for evaluation.  [default: 8]")
    ] = None,
    eval_every: Annotated[
        int | None,
        typer.Option("--eval-every", help="Steps between evaluations, which save.  [default: an eighth of the run]"),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            "--patience",
            help="Stop after so many evaluations without progress in the second half; 0: never.  [default: 4]",
        ),
    ] = None,
    max_skipped: Annotated[
        int | None, typer.Option("--max-skipped", help="Non-finite steps before giving up.  [default: 8]")
    ] = None,
    log_with: Annotated[
        str | None,
        typer.Option("--log-with", help="Also log to tensorboard, trackio or another tracker that accelerate knows."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last saved state in OUT.healing.")] = False,
    device: options.Device = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Train a converted model back toward its source; under torchrun or accelerate launch, all processes together."""
    if revision is not None and teacher is None:
        raise typer.BadParameter("--revision is of a teacher on the hub; name it with --teacher")
    teacher = at_revision(teacher, revision) if teacher is not None else None
    settings: dict[str, Any] = options.given(
        tokens=options.count_of(tokens, "--tokens"),
        data=data,
        field=field,
        train=train,
        seqlen=seqlen,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        lr=lr,
        warmup=warmup,
        weight_decay=weight_decay,
        clip=clip,
        kl_weight=kl_weight,
        ce_weight=ce_weight,
        temperature=temperature,
        teacher_top_k=teacher_top_k,
        precision=precision,
        gradient_checkpointing=gradient_checkpointing,
        shard=shard,
        seed=seed,
        eval_blocks=eval_blocks,
        eval_every=eval_every,
        patience=patience,
        max_skipped=max_skipped,
    )
    with options.interruptible(lambda: pipeline.kept_after_interrupt(out)):
        record = pipeline.heal(
            model,
            out,
            teacher=teacher,
            teacher_logits=teacher_logits,
            log_with=log_with,
            resume=resume,
            overwrite=overwrite,
            device=device,
            track=rich_track,
            meter=rich_meter,
            **settings,
        )
    if options.is_main_process():
        show_healing(record, out)


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
