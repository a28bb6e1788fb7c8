"""The training loop: read a step's blocks, add up gradients, step; evaluate, save, stop when the gap no longer closes."""

from __future__ import annotations

import json
import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from care_mla.config import HealSettings
from care_mla.errors import HealingError
from care_mla.files import append_line, write_tensors, write_text
from care_mla.healing.blocks import Blocks, Order
from care_mla.healing.distillation import LOSSES
from care_mla.healing.processes import autocast, is_main
from care_mla.healing.state import Progress, RunState
from care_mla.healing.top_probabilities import TopProbabilities
from care_mla.progress import Meter
from care_mla.records.healing import HeldOutLoss

if TYPE_CHECKING:
    from accelerate import Accelerator

SHORTEST_WARMUP = 8


def scheduled(step: int, total: int, settings: HealSettings) -> float:
    """Learning rate of a step (from 0) as a share of the highest: linear warm-up, then a cosine.

    A short run warms up for `SHORTEST_WARMUP` steps all the same: Adam's first steps move every weight by the whole rate,
    whatever its gradient, and that alone can lose more than a short run brings back.
    """
    rising = max(round(settings.warmup * total), min(SHORTEST_WARMUP, total // 4)) if settings.warmup else 0
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, total - rising)
    return settings.lr_floor + (1.0 - settings.lr_floor) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


@dataclass
class Run:
    """One healing run on one process.

    Attributes:
        module: from `processes.distribute`.
        train, held_out: text.
        top: the teacher's stored probabilities of `train`; None runs the teacher.
        work: directory of the state and of what is left of bad batches.
        metrics: JSON lines, one a step and one an evaluation.
        lr: highest learning rate, see `preconditioning`.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    train: Blocks
    held_out: Blocks
    top: TopProbabilities | None
    settings: HealSettings
    accelerator: Accelerator
    work: Path
    metrics: Path
    lr: float

    def __post_init__(self) -> None:
        self.state = RunState(self.work)
        self.progress = Progress()
        self.steps = self.settings.num_steps
        self.every = self.settings.eval_every or max(1, self.steps // 8)

    # --- one step -----------------------------------------------------------------------------------------------------

    def _own(self, rows: Tensor) -> list[Tensor]:
        """This process's part of a step's blocks, in micro-batches."""
        own = rows[self.accelerator.process_index :: self.accelerator.num_processes]
        return list(own.split(self.settings.micro_batch_size or max(1, len(own))))

    def _gradients_in_step(self, last: bool) -> AbstractContextManager[Any]:
        """Exchange gradients after the last micro-batch of a step alone."""
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_gradient_sync(last)
            return nullcontext()
        return nullcontext() if last else self.accelerator.no_sync(self.module)

    def _batch(self, blocks: Blocks) -> tuple[Tensor, Tensor]:
        device = self.accelerator.device
        return blocks.input_ids.long().to(device), blocks.positions.long().to(device)

    def _losses(self, rows: Tensor) -> Tensor:
        device = self.accelerator.device
        top, ids = (None, None) if self.top is None else self.top.rows(rows, device)
        with autocast(device, self.settings.precision):
            losses: Tensor = self.module(*self._batch(self.train[rows]), top, ids, False)
        return losses

    def step(self) -> dict[str, float]:
        """One optimizer step; returns what the metrics say of it."""
        step, settings = self.progress.step, self.settings
        lr = self.lr * scheduled(step, self.steps, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        rows = Order(len(self.train), settings.batch_size, settings.seed).rows(step)
        tokens = rows.numel() * settings.seqlen
        parts, sums = self._own(rows), torch.zeros(len(LOSSES))
        for index, part in enumerate(parts):
            with self._gradients_in_step(index == len(parts) - 1):
                losses = self._losses(part)
                # Gradients are averaged over processes: each gives its share of the whole step's mean, times their number.
                (losses[0] * (self.accelerator.num_processes / tokens)).backward()
            sums += losses.detach().float().cpu()
        sums = _summed(sums, self.accelerator) / tokens
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        total: Any = nn.utils.clip_grad_norm_(trained, settings.clip)
        norm = float(total.full_tensor() if hasattr(total, "full_tensor") else total)
        finite = bool(sums.isfinite().all()) and math.isfinite(norm)
        if finite:
            self.optimizer.step()
        else:
            self._skip(rows)
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        self.progress.tokens += tokens
        loss, kl, ce, _ = sums.tolist()
        return {"loss": loss, "kl": kl, "ce": ce, "lr": lr, "norm": norm, "skipped": self.progress.skipped}

    def _skip(self, rows: Tensor) -> None:
        """Count a step that cannot be taken, keep its blocks, and give up after too many.

        Raises:
            HealingError
        """
        self.progress.skipped += 1
        path = self.work / f"bad-batch-{self.progress.step}.safetensors"
        if is_main():
            write_tensors(path, self.train[rows].to_tensors())
        if self.progress.skipped > self.settings.max_skipped:
            raise HealingError(
                f"loss or gradient was not finite in {self.progress.skipped} steps, the last is {self.progress.step}, its tokens are in {path}; "
                "lower --lr, or use --precision float32"
            )

    # --- evaluation ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self) -> HeldOutLoss:
        """What the held-out blocks lose now."""
        sums = torch.zeros(len(LOSSES))
        own = torch.arange(len(self.held_out))
        # Under FSDP2 every process must run as many passes: all of them read all blocks.
        for part in own.split(self.settings.micro_batch_size or self.settings.batch_size):
            with autocast(self.accelerator.device, self.settings.precision):
                sums += self.module(*self._batch(self.held_out[part]), None, None, True).float().cpu()
        predicted = int((self.held_out.positions[:, 1:] != 0).sum())
        _, kl, ce, teacher_ce = sums.tolist()
        kl, gap = kl / self.held_out.num_tokens, (ce - teacher_ce) / predicted
        return HeldOutLoss(
            step=self.progress.step,
            tokens=self.progress.tokens,
            kl=kl,
            ce=ce / predicted,
            teacher_ce=teacher_ce / predicted,
            gap=gap,
            lost=(kl + max(gap, 0.0)) / 2,
        )

    def _look(self) -> bool:
        """Evaluate and save; whether the run should go on."""
        progress = self.progress
        result = self.evaluate()
        if not math.isfinite(result.lost):
            raise HealingError("the held-out loss is not finite; lower --lr, or use --precision float32")
        best = min((e.lost for e in progress.evaluations), default=math.inf)
        progress.evaluations.append(result)
        self._record({"evaluation": asdict(result)})
        if result.lost < best:
            progress.best_step, progress.stale = progress.step, 0
            self.state.save_best(self.module)
        elif progress.step > self.steps // 2:  # before, the rate is too high to tell
            progress.stale += 1
        self.state.save(self.module, self.optimizer, progress)
        return not self.settings.patience or progress.stale < self.settings.patience

    def _record(self, values: dict[str, Any]) -> None:
        if is_main():
            append_line(self.metrics, json.dumps(values))
        held_out = values.get("evaluation")
        named = {f"held_out/{k}": v for k, v in held_out.items()} if held_out else values
        self.accelerator.log(named, step=self.progress.step)  # to the trackers of --log-with, if any

    # --- all of it ----------------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Go on from the saved state, if there is one: metrics of steps that will be done again are struck out."""
        saved = self.state.load(self.module, self.optimizer)
        done = -1 if saved is None else saved.step
        self.progress = saved or self.progress
        path = self.metrics
        if is_main() and path.is_file():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= done]
            write_text(path, "".join(f"{line}\n" for line in kept))

    def train_all(self, meter: Meter) -> Progress:
        """Train to the end of the budget, or until evaluations show no progress; the best weights are in the model then."""
        progress = self.progress
        going = bool(progress.evaluations) or self._look()
        going = going and not (self.settings.patience and progress.stale >= self.settings.patience)
        while going and progress.step < self.steps:
            begun = time.monotonic()
            values = self.step()
            progress.seconds += time.monotonic() - begun
            speed = progress.tokens / max(progress.seconds, 1e-9)
            self._record({"step": progress.step, "tokens": progress.tokens, **values, "tokens_per_second": speed})
            last = progress.evaluations[-1]
            meter(
                progress.tokens,
                {"loss": values["loss"], "held-out KL": last.kl, "gap": last.gap, "tokens/s": speed},
            )
            if progress.step % self.every == 0 or progress.step == self.steps:
                going = self._look()
        if progress.best_step != progress.step:
            self.state.load_best(self.module)
        return progress


def _summed(values: Tensor, accelerator: Accelerator) -> Tensor:
    """Sum over processes."""
    if not dist.is_initialized():
        return values
    values = values.to(accelerator.device)
    dist.all_reduce(values)
    return values.cpu()


def _step_of(line: str) -> int:
    value = json.loads(line)
    return int(value.get("evaluation", value)["step"])
