"""Error propagation: the original and the converted model side by side, layer by layer, each output projection refitted.

A converted layer receives inputs that the layers before it have already bent, and its own attention output is bent too. Both
errors meet in the residual stream after the attention, where the output projection can be moved, in closed form, to take
part of them back. It costs no cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from care_mla.errors import CalibrationError, NumericalError
from care_mla.families import FamilySpec
from care_mla.families.spec import Projection
from care_mla.layouts import DenseProjections
from care_mla.linalg import ridge_refit
from care_mla.runtime import LayerWalk, standing_in, sums_device
from care_mla.stats import CrossMoments
from care_mla.text import TokenWindows


@dataclass(frozen=True)
class OutputRefit:
    """A refitted output projection.

    Attributes:
        weight: [D, n_h d_h], float64.
        error_before, error_after: E||t - W a||^2 / E||t||^2 with the source's weight and with this one, on the tokens it
            was fitted to.
    """

    weight: Tensor
    error_before: float
    error_after: float


@dataclass(frozen=True)
class _Counted:
    """Which tokens of a batch count: [batch * seqlen] bool; and how much: [counted tokens] float64."""

    tokens: Tensor
    weight: Tensor


class Propagation:
    """Walks the layers in order, with the stream of the converted model beside the source's; `refit` must be called once for each layer.

    Args:
        model: the source model. Its layers are changed only while one of them runs.
        windows: calibration tokens; both residual streams, a layer's targets and its attention's contexts are held for all
            of them, about 4 x tokens x D elements.
        ridge: see `linalg.ridge_refit`.
    """

    def __init__(
        self, model: PreTrainedModel, family: FamilySpec, windows: TokenWindows, *, ridge: float, batch_size: int = 8
    ):
        self.model, self.family, self.ridge = model, family, ridge
        self.walk = LayerWalk(model, family, windows.batches(batch_size))
        self.converted = list(self.walk.streams)
        self._counted = []
        for batch in self.walk.batches:
            tokens = batch.attention_mask.flatten().bool()
            weight = batch.token_weight.flatten()[tokens]
            self._counted.append(_Counted(tokens.to(model.device), weight.to(sums_device(model.device))))
        self._next = 0

    @torch.no_grad()
    def refit(self, layer: int, projections: DenseProjections) -> OutputRefit:
        """Advance both streams through one layer and refit its output projection.

        With h_o, h_c the streams entering the layer and u_o = h_o + s attention(h_o) the original after its attention (s is 1 but for
        families with a factor there), the target is t = (u_o - h_c) / s, the input a that of the converted output projection, and a
        token weighs 1 / mean(u_o^2): the norm that reads the stream next sees relative errors. Where a norm stands between the
        attention and the stream, no map before it can take the stream's error back: t = u_o = attention(h_o) then.

        Args:
            projections: key and value maps of the converted layer.

        Raises:
            CalibrationError: non-finite activations, with the layer named.

        Source: closed form from cross moments, as in sequential layer-wise calibration (GPTQ and its kin); ours in the
        choice of target and weights, see docs/decisions/output-refit.md.
        """
        assert layer == self._next, "layers are refitted in order"
        self._next += 1
        attention = self.walk.attention(layer)
        o_proj: nn.Linear = getattr(attention, self.family.o_proj)
        targets = self._advance_original(layer, o_proj)
        device = sums_device(self.model.device)
        moments = CrossMoments.zeros(o_proj.in_features, o_proj.out_features, device=device)
        W = o_proj.weight.to(device).double()
        contexts: list[Tensor] = []
        with _converted(attention, self.family, projections):
            for index, (target, weight) in enumerate(targets):
                context, counted = self._attention_context(layer, index, o_proj), self._counted[index]
                moments.update(
                    context.flatten(0, 1)[counted.tokens],
                    target.flatten(0, 1)[counted.tokens],
                    weight.flatten()[counted.tokens].to(device) * counted.weight,
                )
                contexts.append(context)
        try:
            refitted = ridge_refit(W, moments.input_second / moments.weight, moments.cross / moments.weight, self.ridge)
        except NumericalError as error:
            raise CalibrationError(f"layer {layer}: {error}; convert with --no-refit") from error
        for index, context in enumerate(contexts):
            output = linear(context, refitted.to(context.dtype).to(context.device), o_proj.bias)
            # transformers' attentions return their output and their weights
            with standing_in([attention], lambda *inputs, output=output, **keywords: (output, None)):
                self.converted[index] = self.walk.run(layer, index, self.converted[index])
        return OutputRefit(refitted.cpu(), moments.relative_error(W), moments.relative_error(refitted))

    def _advance_original(self, layer: int, o_proj: nn.Linear) -> list[tuple[Tensor, Tensor]]:
        """Run the original layer; by batch, the target of the converted output projection and the weight of each token, float32.

        Sums and differences with the streams are not rounded to the model's precision, and a bias is left out of the
        product rather than subtracted from it.
        """
        targets: list[tuple[Tensor, Tensor]] = []
        entering: list[Tensor] = list(self.walk.streams)
        scale = float(getattr(self.model.config, self.family.residual_scale)) if self.family.residual_scale else 1.0

        def note_target(index: int) -> None:
            output = seen["output"].float()
            without_bias = output if o_proj.bias is None else linear(seen["input"], o_proj.weight).float()
            if self.family.output_norm:
                targets.append((without_bias, 1.0 / output.square().mean(-1)))
                return
            original = entering[index].float()
            target = (original + scale * without_bias - self.converted[index].float()) / scale
            targets.append((target, 1.0 / (original + scale * output).square().mean(-1)))

        with _watched(o_proj) as seen:
            self.walk.forward(layer, after=note_target)
        return targets

    def _attention_context(self, layer: int, index: int, o_proj: nn.Linear) -> Tensor:
        """Input of the output projection in the converted stream; what follows it in the layer is not run."""
        with _watched(o_proj, stop=True) as seen, suppress(_Reached):
            self.walk.run(layer, index, self.converted[index])
        return seen["input"]


@contextmanager
def _converted(attention: Any, family: FamilySpec, projections: DenseProjections) -> Iterator[None]:
    """Key and value projections replaced by those of the converted layer."""
    geometry = family.geometry(attention.config.to_dict())
    maps: list[tuple[Projection, Tensor, Tensor | None]] = [
        ("k", projections.k, projections.k_bias),
        ("v", projections.v, projections.v_bias),
    ]
    stored = [(*family.stored(projection, geometry), weight, bias) for projection, weight, bias in maps]
    originals: dict[str, nn.Linear] = {name: getattr(attention, name) for name, *_ in stored}
    with_bias = projections.k_bias is not None or projections.v_bias is not None
    try:
        for name, like in originals.items():
            weight = like.weight
            replacement = nn.Linear(
                weight.shape[1],
                weight.shape[0],
                bias=with_bias or like.bias is not None,
                device=weight.device,
                dtype=weight.dtype,
            )
            replacement.weight.copy_(weight)
            if replacement.bias is not None:
                replacement.bias.copy_(torch.zeros_like(replacement.bias) if like.bias is None else like.bias)
            setattr(attention, name, replacement)
        for name, rows, weight, bias in stored:
            replacement = getattr(attention, name)
            # To the dtype first: the device may have no float64.
            replacement.weight[rows] = weight.to(replacement.weight.dtype).to(replacement.weight.device)
            if bias is not None:
                replacement.bias[rows] = bias.to(replacement.bias.dtype).to(replacement.bias.device)
        yield
    finally:
        for name, module in originals.items():
            setattr(attention, name, module)


class _Reached(Exception):  # noqa: N818  (a signal, not an error)
    """The output projection has been reached."""


@contextmanager
def _watched(module: nn.Linear, *, stop: bool = False) -> Iterator[dict[str, Tensor]]:
    """Input and output of a projection's next call; with `stop` it is not carried out."""
    seen: dict[str, Tensor] = {}

    def before(module: nn.Module, inputs: tuple[Tensor]) -> None:
        seen["input"] = inputs[0]
        if stop:
            raise _Reached

    def after(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        seen["output"] = output

    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
