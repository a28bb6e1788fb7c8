"""One streaming pass over the calibration text with hooks on the key and value projections."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from care_mla.calibration.corpus import TokenWindows
from care_mla.errors import CalibrationError
from care_mla.families import FamilySpec
from care_mla.progress import Track, silent
from care_mla.stats import Moments


class _LayerTap:
    """Feeds one layer's projection inputs and outputs into its `Moments`. Keys are held until the values arrive."""

    def __init__(self, layer: int, moments: Moments):
        self.layer = layer
        self.moments = moments
        self.token_weight: Tensor | None = None  # [tokens], None when all count 1
        self.counted: Tensor | None = None  # [tokens] bool, None when all count
        self._keys: Tensor | None = None

    def on_keys(self, module: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> None:
        self._keys = _without_bias(output, module)

    def on_values(self, module: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> None:
        assert self._keys is not None
        y = torch.cat([self._keys, _without_bias(output, module)], dim=-1).flatten(0, 1)
        x = inputs[0].flatten(0, 1)
        self._keys = None
        if self.counted is not None:
            x, y = x[self.counted], y[self.counted]
        try:
            self.moments.update(x, y, self.token_weight)
        except CalibrationError as error:
            raise CalibrationError(
                f"layer {self.layer}: {error} in the key/value projections; the checkpoint is damaged or overflows in this dtype (try --dtype float32)"
            ) from error


def _without_bias(output: Tensor, module: nn.Linear) -> Tensor:
    return output if module.bias is None else output - module.bias


@contextmanager
def _tapped(model: PreTrainedModel, family: FamilySpec, taps: list[_LayerTap]) -> Iterator[None]:
    handles = []
    try:
        for tap in taps:
            attention = model.get_submodule(family.attention_name(tap.layer))
            handles.append(attention.get_submodule(family.k_proj).register_forward_hook(tap.on_keys))
            handles.append(attention.get_submodule(family.v_proj).register_forward_hook(tap.on_values))
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def collect_moments(
    model: PreTrainedModel,
    family: FamilySpec,
    windows: TokenWindows,
    *,
    with_inputs: bool = False,
    batch_size: int = 8,
    track: Track = silent,
) -> list[Moments]:
    """Moments of every layer from one forward pass over the windows; nothing but the sums is kept.

    Args:
        with_inputs: also E[x x^T], for care_c.

    Raises:
        CalibrationError: non-finite activations, with the layer named.
    """
    geometry = family.geometry(model.config.to_dict())
    taps = [
        _LayerTap(
            layer,
            Moments.zeros(2 * geometry.kv_width, geometry.hidden_size, with_inputs=with_inputs, device=model.device),
        )
        for layer in range(geometry.num_layers)
    ]
    decoder = model.get_decoder()  # without the language-model head: its logits are not needed
    with _tapped(model, family, taps):
        for batch in track(windows.batches(batch_size), "Collecting moments", -(-len(windows) // batch_size)):
            full = bool(batch.attention_mask.all())
            weights = batch.token_weight.flatten()
            counted = None if full else batch.attention_mask.flatten().bool().to(model.device)
            for tap in taps:
                tap.counted = counted
                tap.token_weight = (
                    None if bool((weights == 1).all()) else (weights if full else weights[weights > 0]).to(model.device)
                )
            decoder(
                input_ids=batch.input_ids.to(model.device),
                attention_mask=None if full else batch.attention_mask.to(model.device),
                use_cache=False,
            )
    return [tap.moments for tap in taps]
