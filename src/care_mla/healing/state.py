"""Everything that a run needs to go on where it was killed, written so that a kill at any moment leaves a whole state.

torch's distributed checkpoint holds trained weights and optimizer, whatever the number of processes; a JSON beside it the rest.
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from care_mla.errors import HealingError
from care_mla.files import write_text, writing
from care_mla.healing.processes import is_main, wait
from care_mla.interrupts import uninterrupted
from care_mla.records.healing import HeldOutLoss

PROGRESS = "progress.json"
_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        step: optimizer steps taken or skipped.
        tokens: trained on.
        skipped: steps with a non-finite loss or gradient.
        seconds: spent in training steps.
        stale: evaluations since the best one.
        best_step: of the evaluation that lost least.
        evaluations: of held-out text, by step; the first is the model as it came.
        rng: state of torch's generator, base 16.
    """

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    seconds: float = 0.0
    stale: int = 0
    best_step: int = 0
    evaluations: list[HeldOutLoss] = field(default_factory=list)
    rng: str = ""

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Progress:
        """As `asdict` made it."""
        return cls(**{**saved, "evaluations": [HeldOutLoss(**each) for each in saved["evaluations"]]})


@contextmanager
def _checkpointing(directory: Path, failed: str) -> Iterator[None]:
    """torch's distributed checkpoint wraps whatever stops it on a process, Ctrl-C as well, in one exception of its own.

    Raises:
        HealingError: "`directory` `failed`", and why.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # what it logs, traceback and all, it raises as well
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one process without a process group is what we mean
            yield
    except dcp.api.CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        if any(_began_as_interrupt(cause) for cause in causes):
            raise KeyboardInterrupt from None
        why = next((line for cause in causes for line in str(cause).splitlines()), type(causes[0]).__name__)
        raise HealingError(f"{directory} {failed} ({why})") from error
    finally:
        logging.disable(disabled)


def _began_as_interrupt(error: BaseException | None) -> bool:
    """Whether Ctrl-C is at the root of an error; a half-written archive complains of its length where it is closed."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _save(values: dict[str, Any], directory: Path) -> None:
    # An interrupt inside torch's writer, which calls back into Python from a C++ destructor, would abort the process.
    with uninterrupted(), _checkpointing(directory, "cannot be written"):
        dcp.save(values, checkpoint_id=directory)


def _load(values: dict[str, Any], directory: Path) -> None:
    with _checkpointing(directory, "cannot be read; start anew with --overwrite"):
        dcp.load(values, checkpoint_id=directory)


def trained_state(model: nn.Module, options: StateDictOptions = _TRAINED) -> dict[str, Any]:
    """Trained weights by name, sharded as the model is."""
    trained = {name.removeprefix("module.") for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = get_model_state_dict(model, options=options)
    return {name: value for name, value in state.items() if name in trained}  # a frozen tied weight has a second name


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Of every trained weight; one that has not stepped yet is as new, though torch makes its state by a step of zero."""
    fresh = not optimizer.state
    state: dict[str, Any] = get_optimizer_state_dict(model, optimizer)
    if fresh:
        for values in optimizer.state.values():
            if "step" in values:
                values["step"].zero_()
        state = get_optimizer_state_dict(model, optimizer)
    return state


def full_trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Trained weights by name, whole, on the CPU of the main process."""
    return trained_state(
        model, StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)
    )


class RunState:
    """The saved states of one run: the newest, and the best by evaluation."""

    def __init__(self, directory: Path):
        self.directory = directory

    def _newest(self) -> Path | None:
        steps = sorted(self.directory.glob("step-*[0-9]"), key=lambda path: int(path.name.removeprefix("step-")))
        return steps[-1] if steps else None

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Replace the newest state."""
        progress.rng = bytes(torch.get_rng_state().tolist()).hex()
        target = self.directory / f"step-{progress.step}"
        staging = target.with_name(f"{target.name}.partial")
        if is_main():
            shutil.rmtree(staging, ignore_errors=True)
            with writing(staging):
                staging.mkdir(parents=True)
        wait()
        _save({"model": trained_state(model), "optimizer": optimizer_state(model, optimizer)}, staging)
        if is_main():
            write_text(staging / PROGRESS, json.dumps(asdict(progress)))
            shutil.rmtree(target, ignore_errors=True)
            with writing(target):
                staging.rename(target)
                for other in self.directory.glob("step-*"):
                    if other != target:
                        shutil.rmtree(other)
        wait()

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress | None:
        """Continue from the newest state; None where there is none."""
        newest = self._newest()
        if newest is None:
            return None
        values = {"model": trained_state(model), "optimizer": optimizer_state(model, optimizer)}
        _load(values, newest)
        try:
            progress = Progress.from_dict(json.loads((newest / PROGRESS).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise HealingError(f"{newest / PROGRESS} cannot be read; start anew with --overwrite ({error})") from error
        set_model_state_dict(model, values["model"], options=_TRAINED)
        set_optimizer_state_dict(model, optimizer, values["optimizer"])
        torch.set_rng_state(torch.tensor(list(bytes.fromhex(progress.rng)), dtype=torch.uint8))
        return progress

    def save_best(self, model: nn.Module) -> None:
        """Replace the best weights."""
        staging, target = self.directory / "best.partial", self.directory / "best"
        if is_main():
            shutil.rmtree(staging, ignore_errors=True)
        wait()
        _save({"model": trained_state(model)}, staging)
        if is_main():
            shutil.rmtree(target, ignore_errors=True)
            with writing(target):
                staging.rename(target)
        wait()

    def load_best(self, model: nn.Module) -> None:
        """Put the best weights into the model."""
        values = {"model": trained_state(model)}
        _load(values, self.directory / "best")
        set_model_state_dict(model, values["model"], options=_TRAINED)
