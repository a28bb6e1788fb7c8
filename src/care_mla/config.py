"""Typed settings of the stages; the CLI and the Python API fill the same ones."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from care_mla.errors import ConfigError
from care_mla.methods import Weighting
from care_mla.ranks.plan import Layout
from care_mla.rope import RopeMode
from care_mla.runtime import dtype_name, resolve_dtype, resolve_precision

DType = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"], BeforeValidator(lambda dtype: dtype_name(resolve_dtype(dtype)))
]
Precision = Annotated[Literal["auto", "float32", "bfloat16"], BeforeValidator(resolve_precision)]
QkNorm = Literal["exact", "linear"]
Trained = Literal["kv", "attention", "all"]
"""Which weights healing trains: the factors of keys and values, whole attentions, or everything."""


LARGEST_SEED = 2**40
"""Generators take 64 bits, and seeds of parts and epochs are made from this one."""


class Settings(BaseModel):
    """Frozen, no unknown names."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def make(cls, **values: Any) -> Any:
        """Validated settings.

        Raises:
            ConfigError: one sentence naming the option.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            option = "--" + "-".join(str(part) for part in first["loc"]).replace("_", "-")
            raise ConfigError(f"{option} {first.get('input')!r}: {first['msg'].lower()}") from error


class CalibrationSettings(Settings):
    """What text the statistics come from.

    Attributes:
        calibration: SPEC, see `calibration.corpus.make_windows`.
        field: field of records that holds the text.
        pack: windows at random positions of the joined text; otherwise one padded window a document.
        inputs: also collect the D x D input moment, for care_c and low-rank queries.
        normalized: also collect normalized queries and keys beside the layer's input, for linearized QK-norm.
        fisher: also run a backward pass and collect Fisher statistics, for method fisher.
    """

    calibration: str = "self"
    field: str | None = None
    samples: int = Field(128, ge=1)
    seqlen: int = Field(256, ge=2)
    seed: int = Field(42, ge=-LARGEST_SEED, le=LARGEST_SEED)
    batch_size: int = Field(8, ge=1)
    pack: bool = True
    inputs: bool = False
    normalized: bool = False
    fisher: bool = False


class Recipe(Settings):
    """How the weights are converted.

    Attributes:
        ranks, fisher_exponent, refit: None leaves them to the budget, see `conversion.policy`.
        ranks: allocator, a name of `ranks.ALLOCATORS`.
        shrinkage, fisher_exponent, fisher_shrinkage: see `methods.Weighting`.
        centre: whether method fisher may give means back as biases; a target without biases needs False.
        rope: which pairs stay rotary in layout mla, see `rope.select`.
        freq_fold: adjacent frequencies that rope stock and transmla treat as one (TransMLA's FreqFold); None is 1, for rope
            stock as many as share a rotary pair and at least 2, unless every pair is kept.
        qk_rope_head_dim: width of the shared rotary key in layout mla; None: of least predicted loss, or the head's own width
            where the method does not predict.
        q_lora_rank: rank of the queries in layout mla, see `mapping.queries`; None: exact.
        qk_norm: how layout mla keeps the norms of queries and keys: exact, with a cached scale a kv head, or linear, see
            `mapping.qk_norm`.
        context: positions that attention must span when rotations are dropped, layout mla.
        refit: whether output projections are refitted layer by layer (`calibration.Propagation`).
        refit_tokens: calibration tokens that the refit reads.
        refit_ridge: see `linalg.ridge_refit`.
        dtype: of the written factors; "auto" is the source's.
    """

    layout: Layout = "joint"
    method: str = "fisher"
    ranks: str | None = None
    rank: int | None = None
    kv_save: float | None = None
    cache_elements: int | None = None
    min_rank: int | None = None
    max_rank: int | None = None
    rank_multiple: int = Field(1, ge=1)
    shrinkage: float = Field(0.01, ge=0.0, le=1.0)
    fisher_exponent: float | None = Field(None, ge=0.0, le=1.0)
    fisher_shrinkage: float = Field(0.02, ge=0.0, le=1.0)
    centre: bool = True
    rope: RopeMode = "free"
    freq_fold: int | None = Field(None, ge=1)
    qk_rope_head_dim: int | None = Field(None, ge=2, multiple_of=2)
    q_lora_rank: int | None = Field(None, ge=1)
    qk_norm: QkNorm = "exact"
    context: int = Field(8192, ge=2)
    refit: bool | None = None
    refit_tokens: int = Field(8192, ge=1)
    refit_ridge: float = Field(0.1, gt=0.0)
    dtype: DType = "auto"

    @property
    def weighting(self) -> Weighting:
        """The part that the methods take; of a recipe in which the exponent is decided."""
        assert self.fisher_exponent is not None
        return Weighting(self.shrinkage, self.fisher_exponent, self.fisher_shrinkage, self.centre)


class HealSettings(Settings):
    """How a converted model is trained back toward its teacher.

    Attributes:
        data: SPEC of the training text, as for calibration.
        field: field of records that holds the text.
        tokens: budget; whole steps are taken.
        seqlen: tokens of a block.
        batch_size: blocks of one optimizer step, over all processes. At a small budget many small steps learn most.
        micro_batch_size: blocks of one forward pass of one process; None: its whole share of the step.
        train: the factors of keys and values alone, whole attentions, or all weights.
        lr: highest learning rate, as the share by which one step changes what a weight gives; None: see `default_lr`.
        warmup: share of the steps in which it rises; it falls along a cosine to `lr_floor` of it.
        weight_decay, clip, betas: of AdamW; largest norm of the gradient.
        kl_weight, ce_weight, temperature: beta, weight of the cross entropy, and tau of L = CE + beta tau^2 KL (Eq. 6-8).
        teacher_top_k: keep this many of the teacher's probabilities per token on disk instead of running it again.
        precision: of the products: bfloat16 (autocast; weights that train stay float32) or float32; auto: bfloat16 where the
            device has it in hardware.
        gradient_checkpointing: recompute layers in the backward pass: less memory, a third more time.
        shard: shard parameters, gradients and optimizer over the processes (FSDP2); otherwise every process holds all.
        seed: of what is held out, and of the order of blocks.
        eval_blocks: blocks held out for evaluation.
        eval_every: steps between evaluations, which also save the state; None: an eighth of the run.
        patience: evaluations without progress in the second half of a run after which it stops; 0 never stops early.
        max_skipped: steps with a non-finite loss or gradient before the run is given up.
    """

    data: str = "self"
    field: str | None = None
    tokens: int = Field(64_000, ge=1)
    seqlen: int = Field(256, ge=8)
    batch_size: int = Field(1, ge=1)
    micro_batch_size: int | None = Field(None, ge=1)
    train: Trained = "kv"
    lr: float | None = Field(None, gt=0.0)
    warmup: float = Field(0.05, ge=0.0, lt=1.0)
    lr_floor: float = Field(0.0, ge=0.0, le=1.0)
    weight_decay: float = Field(0.0, ge=0.0)
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = Field(1.0, gt=0.0)
    kl_weight: float = Field(1.0, ge=0.0)
    ce_weight: float = Field(0.0, ge=0.0)
    temperature: float = Field(1.0, gt=0.0)
    teacher_top_k: int | None = Field(None, ge=1)
    precision: Precision = "auto"
    gradient_checkpointing: bool = False
    shard: bool = False
    seed: int = Field(42, ge=-LARGEST_SEED, le=LARGEST_SEED)
    eval_blocks: int = Field(8, ge=1)
    eval_every: int | None = Field(None, ge=1)
    patience: int = Field(4, ge=0)
    max_skipped: int = Field(8, ge=0)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the budget; at least one."""
        return max(1, self.tokens // (self.batch_size * self.seqlen))

    @property
    def default_lr(self) -> float:
        """Highest learning rate where none is given; relative (`healing.preconditioning`), so the same for all widths."""
        return {"kv": 1.5e-3, "attention": 1e-3, "all": 5e-4}[self.train]
