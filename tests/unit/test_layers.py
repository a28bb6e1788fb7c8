"""The walk through a model's layers: forward as the model runs, backward as autograd does, one layer at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TINY, tiny_model
from torch import Tensor

from care_mla.errors import CalibrationError
from care_mla.families import get_family
from care_mla.runtime import LayerWalk
from care_mla.text import TokenWindows

IDS = torch.randint(3, 250, (5, 24), generator=torch.Generator().manual_seed(0))
WINDOWS = TokenWindows(IDS, torch.tensor([24, 24, 9, 24, 24]), torch.ones(5, dtype=torch.float64))


def _gradient(logits: Tensor, index: int) -> Tensor:
    return torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)


def _whole(model: Any) -> tuple[list[Tensor], list[Tensor]]:
    """What leaves the last layer, and the gradients of what enters the first, by batch, from the model itself."""
    layers = model.get_submodule(get_family(model.config.to_dict()).layers)
    tops, gradients = [], []
    for batch in WINDOWS.batches(2):
        seen: dict[str, Tensor] = {}

        def enter(module: Any, inputs: tuple[Tensor], seen: dict[str, Tensor] = seen) -> tuple[Tensor]:
            seen["entering"] = inputs[0].detach().requires_grad_(True)
            return (seen["entering"],)

        def leave(module: Any, inputs: Any, output: Tensor, seen: dict[str, Tensor] = seen) -> None:
            seen["top"] = output.detach()

        handles = [layers[0].register_forward_pre_hook(enter), layers[-1].register_forward_hook(leave)]
        logits = model(batch.input_ids, attention_mask=batch.mask_or_none(model.device), use_cache=False).logits
        logits.backward(_gradient(logits, 0))
        for handle in handles:
            handle.remove()
        assert seen["entering"].grad is not None
        tops.append(seen["top"])
        gradients.append(seen["entering"].grad)
    model.zero_grad()
    return tops, gradients


@pytest.mark.parametrize("name", sorted(TINY))
def test_both_sweeps_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    tops, gradients = _whole(model)
    walk = LayerWalk(model, get_family(model.config.to_dict()), WINDOWS.batches(2), inputs=tmp_path)
    first = walk.streams
    assert [stream.shape[:2] for stream in first] == [(2, 24), (2, 24), (1, 24)]
    for layer in range(len(walk.layers)):
        walk.forward(layer)
    for stream, top in zip(walk.streams, tops, strict=True):
        assert float((stream - top).norm() / top.norm()) < 1e-5
    assert len(list(tmp_path.iterdir())) == 3 * len(walk.layers)
    with walk.backward_sweep(_gradient):
        for layer in reversed(range(len(walk.layers))):
            walk.backward(layer)
    for stream, gradient in zip(walk.streams, gradients, strict=True):
        assert float((stream - gradient).norm() / gradient.norm()) < 1e-5
    assert not list(tmp_path.iterdir()) and all(p.requires_grad and p.grad is None for p in model.parameters())


def test_consumers_see_one_batch_of_one_layer(tmp_path: Path) -> None:
    model = tiny_model("llama")
    walk = LayerWalk(model, get_family(model.config.to_dict()), WINDOWS.batches(2))
    steps: list[tuple[str, int]] = []
    walk.forward(0, before=lambda index: steps.append(("before", index)), after=lambda i: steps.append(("after", i)))
    assert steps == [(word, index) for index in range(3) for word in ("before", "after")]
    with walk.backward_sweep(_gradient), pytest.raises(AssertionError, match="no way back"):
        walk.backward(0)


def test_a_backward_pass_that_fails_is_named(tmp_path: Path) -> None:
    model = tiny_model("llama")
    walk = LayerWalk(model, get_family(model.config.to_dict()), WINDOWS.batches(2), inputs=tmp_path)
    for layer in range(len(walk.layers)):
        walk.forward(layer)
    with (
        pytest.raises(CalibrationError, match="backward pass failed"),
        walk.backward_sweep(lambda logits, _: logits[:1, :1]),
    ):
        pass
    assert all(parameter.requires_grad for parameter in model.parameters())
