"""Settings of `care heal`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from care_mla.config.base import LARGEST_SEED, RUN_PANEL, TEXT_PANEL, TRAINING_PANEL, Option, Settings
from care_mla.config.dtypes import Precision
from care_mla.names import Trained

HEAL_TEXT_PANEL = TEXT_PANEL.replace("calibration", "training")


class HealSettings(Settings):
    """How a converted model is trained back toward its teacher.

    Attributes:
        data: SPEC of the training text, as for calibration.
        tokens: budget; whole steps are taken.
        micro_batch_size: blocks of one forward pass of one process; None: its whole share of the step.
        train: the factors of keys and values alone, whole attentions, or all weights.
        lr: highest learning rate, as the share by which one step changes what a weight gives; None: see `default_lr`.
        warmup: share of the steps in which it rises; it falls along a cosine to `lr_floor` of it.
        weight_decay, clip, betas: of AdamW; largest norm of the gradient.
        kl_weight, ce_weight, temperature: beta, weight of the cross entropy, and tau of L = CE + beta tau^2 KL (Eq. 6-8).
        teacher_top_k: keep this many of the teacher's probabilities per token on disk instead of running it again.
        precision: of the products: bfloat16 (autocast; weights that train stay float32) or float32; auto: bfloat16 where the
            device has it in hardware.
        shard: shard parameters, gradients and optimizer over the processes (FSDP2); otherwise every process holds all.
        eval_every: steps between evaluations, which also save the state; None: an eighth of the run.
        patience: evaluations without progress in the second half of a run after which it stops; 0 never stops early.
        max_skipped: steps with a non-finite loss or gradient before the run is given up.
    """

    tokens: Annotated[
        int,
        Option(
            "Budget, e.g. 64k, 0.25M, 250000.",
            count=True,
            also=("num-tokens", "heal-tokens", "max-tokens", "steps", "max-steps"),
        ),
        Field(ge=1),
    ] = 64_000
    data: Annotated[
        str,
        Option(
            "Training text, as --calibration of `care calibrate`; corpora of the hub are streamed.",
            metavar="SPEC",
            also=("dataset", "text", "corpus", "calibration", "heal-data"),
        ),
    ] = "self"
    train: Annotated[
        Trained,
        Option(
            "kv: the factors of keys and values; attention: whole attentions; all: every weight.", also=("trainable",)
        ),
    ] = "kv"
    lr: Annotated[
        float | None,
        Option(
            "Highest learning rate: by what share a step changes what a weight gives.",
            default="kv 1.5e-3, attention 1e-3, all 5e-4",
            also=("learning-rate",),
        ),
        Field(gt=0.0),
    ] = None
    field: Annotated[
        str | None,
        Option(
            "Field of a record that holds the text, or the messages of a chat.",
            HEAL_TEXT_PANEL,
            default="found",
            metavar="NAME",
            also=("column",),
        ),
    ] = None
    seqlen: Annotated[
        int,
        Option("Tokens in a block.", HEAL_TEXT_PANEL, also=("seq-len", "sequence-length", "max-length")),
        Field(ge=8),
    ] = 256
    eval_blocks: Annotated[int, Option("Blocks held out for evaluation.", HEAL_TEXT_PANEL), Field(ge=1)] = 8
    seed: Annotated[
        int,
        Option("Of the blocks held out and the order of the others.", HEAL_TEXT_PANEL),
        Field(ge=-LARGEST_SEED, le=LARGEST_SEED),
    ] = 42
    batch_size: Annotated[
        int, Option("Blocks in a step, over all processes.", TRAINING_PANEL, also=("batch", "bs")), Field(ge=1)
    ] = 1
    micro_batch_size: Annotated[
        int | None,
        Option("Blocks in one forward pass of a process.", TRAINING_PANEL, default="its whole share"),
        Field(ge=1),
    ] = None
    warmup: Annotated[
        float, Option("Share of the steps in which the learning rate rises.", TRAINING_PANEL), Field(ge=0.0, lt=1.0)
    ] = 0.05
    lr_floor: Annotated[
        float, Option("Share of it that is left at the end of the cosine.", TRAINING_PANEL), Field(ge=0.0, le=1.0)
    ] = 0.0
    weight_decay: Annotated[float, Option("Of AdamW.", TRAINING_PANEL), Field(ge=0.0)] = 0.0
    betas: tuple[float, float] = (0.9, 0.98)
    clip: Annotated[
        float, Option("Largest norm of the gradient.", TRAINING_PANEL, also=("max-grad-norm",)), Field(gt=0.0)
    ] = 1.0
    kl_weight: Annotated[float, Option("beta of CE + beta tau^2 KL (Eq. 6-8).", TRAINING_PANEL), Field(ge=0.0)] = 1.0
    ce_weight: Annotated[float, Option("Weight of the cross entropy.", TRAINING_PANEL), Field(ge=0.0)] = 0.0
    temperature: Annotated[float, Option("tau.", TRAINING_PANEL), Field(gt=0.0)] = 1.0
    teacher_top_k: Annotated[
        int | None,
        Option(
            "Run the teacher once, and keep so many probabilities a token on disk.",
            RUN_PANEL,
            default="run it each step",
        ),
        Field(ge=1),
    ] = None
    precision: Annotated[
        Precision,
        Option(
            "Of the products: float32 or bfloat16; auto: bfloat16 where the hardware has it.",
            RUN_PANEL,
            metavar="DTYPE",
            also=("dtype", "bf16", "mixed-precision"),
        ),
    ] = "auto"
    gradient_checkpointing: Annotated[bool, Option("Less memory, a third more time.", RUN_PANEL)] = False
    shard: Annotated[
        bool, Option("Several processes: shard the model over them (FSDP2).", RUN_PANEL, also=("fsdp", "zero"))
    ] = False
    eval_every: Annotated[
        int | None,
        Option(
            "Steps between evaluations, which save the state.",
            RUN_PANEL,
            default="an eighth of the run",
            also=("save-every", "save-steps", "eval-steps"),
        ),
        Field(ge=1),
    ] = None
    patience: Annotated[
        int,
        Option(
            "Stop after so many evaluations without progress in the second half; 0: never.",
            RUN_PANEL,
            also=("early-stopping",),
        ),
        Field(ge=0),
    ] = 4
    max_skipped: Annotated[int, Option("Non-finite steps before giving up.", RUN_PANEL), Field(ge=0)] = 8

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the budget; at least one."""
        return max(1, self.tokens // (self.batch_size * self.seqlen))

    @property
    def default_lr(self) -> float:
        """Highest learning rate where none is given; relative (`healing.preconditioning`), so the same for all widths."""
        return {"kv": 1.5e-3, "attention": 1e-3, "all": 5e-4}[self.train]
