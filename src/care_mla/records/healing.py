"""What a healing run says of itself: `care_heal.json`, and one entry of "healing" in the manifest of a converted model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

FORMAT = "care-mla healing 1"


@dataclass(frozen=True)
class HeldOutLoss:
    """What the held-out blocks lose at one moment of a run; made by `healing.loop.Run.evaluate`.

    Attributes:
        step: optimizer steps before it; 0 is the model as it came.
        tokens: trained on before it, with repetitions.
        kl: KL(teacher || student) = E[log p_t / p_s] over the teacher's own next tokens, nats per token.
        ce: cross entropy of the text's next tokens, nats per predicted token.
        teacher_ce: the same of the teacher.
        gap: ce - teacher_ce, nats per token; negative of a student that learnt the text rather than the teacher.
        lost: (kl + max(gap, 0)) / 2, nats per token, by which the best state is chosen: the KL alone is blind to which errors
            matter on text, the gap alone is noisy.
    """

    step: int
    tokens: int
    kl: float
    ce: float
    teacher_ce: float
    gap: float
    lost: float


@dataclass(frozen=True)
class HealedModel:
    """What was trained.

    Attributes:
        name: as the user called it.
        fingerprint: of its weights before, see `checkpoint.CheckpointReader`.
    """

    name: str
    fingerprint: str


@dataclass(frozen=True)
class Teacher:
    """What it was trained toward.

    Attributes:
        name: directory or hub id.
        fingerprint: of its weights.
        shares_weights: whether one model held both, apart from attentions; else the teacher was a model of its own.
    """

    name: str
    fingerprint: str
    shares_weights: bool


@dataclass(frozen=True)
class TextSizes:
    """Tokens of the packed text, padding none.

    Attributes:
        tokens: to train on; a run may read them several times, or not all.
        held_out_tokens: to evaluate on.
    """

    tokens: int
    held_out_tokens: int


@dataclass(frozen=True)
class TrainedWeights:
    """How much trained.

    Attributes:
        tensors: of the checkpoint.
        parameters: numbers in them.
    """

    tensors: int
    parameters: int


@dataclass(frozen=True)
class HealingRecord:
    """One healing run; made by `healing.record.make_record`.

    Attributes:
        settings: `config.HealSettings`, all of them.
        lr: highest learning rate, as the share by which one step changes what a weight gives (`healing.preconditioning`).
        model, teacher: what was trained, and toward what.
        evaluations_before: what `care evaluate` had found of the model before.
        text: its size.
        trained: how much trained.
        processes: that trained together.
        step: optimizer steps taken or skipped.
        tokens: trained on, with repetitions: step x batch_size x seqlen.
        skipped: steps with a non-finite loss or gradient.
        seconds: spent in training steps, interrupted runs included.
        best_step: after which the written weights were kept.
        evaluations: of the held-out blocks, by step; the first is the model as it came.
        stopped_early: before its budget was spent, since the loss no longer fell.
        tokens_per_second: of training steps, over all processes.
        one_shot, healed: evaluations of the model as it came and of the written weights.
        versions: of what computed it.
    """

    settings: dict[str, Any]
    lr: float
    model: HealedModel
    teacher: Teacher
    evaluations_before: list[dict[str, Any]]
    text: TextSizes
    trained: TrainedWeights
    processes: int
    step: int
    tokens: int
    skipped: int
    seconds: float
    best_step: int
    evaluations: list[HeldOutLoss]
    stopped_early: bool
    tokens_per_second: float
    one_shot: HeldOutLoss
    healed: HeldOutLoss
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """As it is saved."""
        return {"format": FORMAT, **asdict(self)}
