"""A run: everything it needs loaded, measured and spread over the processes, then trained."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from care_mla.config import HealSettings
from care_mla.errors import ConfigError, ConversionError
from care_mla.healing.blocks import Blocks, held_out
from care_mla.healing.distillation import Distillation
from care_mla.healing.loop import Run
from care_mla.healing.pair import Pair
from care_mla.healing.preconditioning import own_weights, parameter_groups, precondition
from care_mla.healing.processes import autocast, distribute, is_bfloat16, on_main
from care_mla.healing.state import full_trained_state
from care_mla.healing.student import (
    Pupil,
    beside_identity_norm,
    family_of,
    make_pupil,
    set_trained,
    share_teacher,
    shrink_frozen,
)
from care_mla.healing.text import run_blocks
from care_mla.healing.top_probabilities import (
    TopProbabilities,
    key_of,
    read_top_probabilities,
    write_top_probabilities,
)
from care_mla.healing.unfinished import UnfinishedRun
from care_mla.modeling import load
from care_mla.progress import MeterFactory, Track, silent_meter
from care_mla.runtime import checkpoint_layers, memory_named

if TYPE_CHECKING:
    from accelerate import Accelerator

SCALE_BLOCKS = 8
"""Blocks of the training text on which inputs and outputs of the factors are measured (`preconditioning`)."""


@dataclass(frozen=True)
class Training:
    """A run that is ready to train.

    Attributes:
        pupil: the model that trains.
        trained: names of the tensors that train, as on disk.
    """

    pair: Pair
    pupil: Pupil
    distillation: Distillation
    run: Run
    trained: list[str]

    @property
    def shares_weights(self) -> bool:
        """Whether one model holds student and teacher."""
        return self.distillation.teacher is None

    def weights(self) -> dict[str, Tensor]:
        """What was trained, as the checkpoint names and scales it; whole on the main process, on which all of them must call this."""
        state = own_weights(self.distillation, full_trained_state(self.run.module))
        trained = {self.pupil.stored_name(name.removeprefix("model.")): tensor for name, tensor in state.items()}
        if not self.pupil.folded:
            return trained
        rank = self.pair.reader.config["kv_lora_rank"]
        return {name: beside_identity_norm(name, tensor, rank) for name, tensor in trained.items()}


def train(
    pair: Pair,
    settings: HealSettings,
    accelerator: Accelerator,
    unfinished: UnfinishedRun,
    *,
    resume: bool,
    teacher_logits: str | Path | None,
    log_with: str | None,
    track: Track,
    meter: MeterFactory | None,
) -> Training:
    """A whole run; the best weights are in its model.

    Args:
        unfinished: where its state is kept, begun or to go on with.
        teacher_logits: directory of the teacher's probabilities; None: that of the run.
        log_with: name of a tracker.

    Raises:
        ConversionError: the state stays where there is something to go on from.
    """
    lower = (
        f"lower --micro-batch-size (now {settings.micro_batch_size or settings.batch_size} blocks) or --seqlen, or give "
        "--gradient-checkpointing or, over several devices, --shard; --resume goes on from the last saved state"
    )
    with memory_named("the model was trained", accelerator.device, lower):
        try:
            training = prepare(pair, settings, accelerator, unfinished, teacher_logits, track)
        except ConversionError:
            if not resume and not unfinished.is_of_conversion:
                on_main(unfinished.remove)
            raise
        run = training.run
        if resume:
            run.resume()
        if log_with is not None:
            accelerator.init_trackers("care-heal", config=settings.model_dump(mode="json", exclude={"betas"}))
        tokens = run.steps * settings.batch_size * settings.seqlen
        with nullcontext(silent_meter) if meter is None else meter(tokens, "tokens") as show:
            run.train_all(show)
    return training


def prepare(
    pair: Pair,
    settings: HealSettings,
    accelerator: Accelerator,
    unfinished: UnfinishedRun,
    teacher_logits: str | Path | None,
    track: Track,
) -> Training:
    """Text, student, teacher, coordinates and optimizer of a run, as they are before its first step."""
    blocks = run_blocks(pair, settings, unfinished.blocks, accelerator.device, track)
    train, evaluation = held_out(blocks, settings.eval_blocks, settings.seed)
    distillation, trained = _distillation(pair, settings, accelerator.device)
    _precondition(distillation, train, settings, unfinished.scales)
    module = distribute(distillation, accelerator, shard=settings.shard)
    lr = settings.lr or settings.default_lr
    optimizer = torch.optim.AdamW(
        parameter_groups(module), lr=lr, betas=settings.betas, weight_decay=settings.weight_decay
    )
    top = None
    if settings.teacher_top_k:
        directory = Path(teacher_logits or unfinished.directory)
        top = _top_probabilities(
            distillation, train, pair.teacher.fingerprint, settings.teacher_top_k, accelerator, directory, track
        )
    run = Run(
        module,
        optimizer,
        train,
        evaluation,
        top,
        settings,
        accelerator,
        unfinished.directory,
        unfinished.metrics,
        lr,
    )
    return Training(pair, distillation.pupil, distillation, run, trained)


def _distillation(pair: Pair, settings: HealSettings, device: torch.device) -> tuple[Distillation, list[str]]:
    """Student and teacher on the CPU, and the names of what trains, as on disk.

    Raises:
        ConfigError: what shall train is stored in another form.
        HealingError, CheckpointError: see `student`.
    """
    family, inner = family_of(pair.reader.config)
    pupil = make_pupil(load(pair.directory, dtype=torch.float32), family, inner=inner)
    shared = share_teacher(pupil, pair.reader, pair.teacher, settings.train)
    teacher = None if shared else load(pair.teacher.directory, dtype=torch.float32).requires_grad_(False)
    trained = set_trained(pupil, settings.train)
    if absent := set(trained) - set(pair.reader.names):
        raise ConfigError(
            f"--train {settings.train} trains {min(absent)}, which {pair.directory} stores in another form; use --train attention"
        )
    if settings.gradient_checkpointing:
        checkpoint_layers(pupil.model, pupil.decoder_layers())
    if is_bfloat16(device, settings.precision) and not settings.shard:
        shrink_frozen(pupil, torch.bfloat16)
    return Distillation(pupil, teacher, settings), trained


def _precondition(distillation: Distillation, train: Blocks, settings: HealSettings, path: Path) -> None:
    """Measure, on blocks from all over the text, the coordinates that the factors train in."""
    measured = train[torch.linspace(0, len(train) - 1, min(len(train), SCALE_BLOCKS)).long()]

    def read_measured() -> None:
        with autocast(torch.device("cpu"), settings.precision):
            for row in torch.arange(len(measured)).split(1):
                distillation.student_logits(measured[row].input_ids.long(), measured[row].positions.long())

    precondition(distillation, path, read_measured)


def _top_probabilities(
    distillation: Distillation,
    train: Blocks,
    teacher: str,
    count: int,
    accelerator: Accelerator,
    directory: Path,
    track: Track,
) -> TopProbabilities:
    """The teacher's `count` most likely tokens of the training text, from disk where an earlier run on it left them.

    Args:
        teacher: fingerprint of its weights.
    """
    settings, device = distillation.settings, accelerator.device
    path = directory / f"teacher-{key_of(train, teacher, count, settings.temperature)}.safetensors"
    accelerator.wait_for_everyone()
    found = read_top_probabilities(path)
    if found is not None:
        return found

    def top_of(blocks: Blocks) -> tuple[Tensor, Tensor]:
        with autocast(device, settings.precision):
            return distillation.teacher_top(
                blocks.input_ids.long().to(device), blocks.positions.long().to(device), count
            )

    return write_top_probabilities(train, path, settings.micro_batch_size or settings.batch_size, top_of, track)
