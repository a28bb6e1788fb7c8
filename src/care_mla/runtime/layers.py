"""A model run layer by layer over batches of tokens: the one engine of everything that looks inside it.

A forward sweep takes all batches through a layer before it goes on to the next. A backward sweep comes back down from the loss, running every
layer again from its kept input. A refit walks a second set of streams beside the first (`calibration.propagation`). Whoever walks sees one layer
at a time; between layers there is one residual stream a batch, and nothing of all layers is kept on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from care_mla.errors import CalibrationError
from care_mla.families import FamilySpec
from care_mla.files import writing
from care_mla.runtime.memory import is_out_of_memory

Step = Callable[[int], None]
"""Called with the number of a batch."""


@dataclass(frozen=True)
class Batch:
    """Tokens ready for a forward pass.

    Attributes:
        input_ids: [batch, seqlen].
        attention_mask: [batch, seqlen], 0 on padding.
        token_weight: [batch, seqlen] float, the token's weight in the statistics; 0 on padding.
    """

    input_ids: Tensor
    attention_mask: Tensor
    token_weight: Tensor

    @property
    def is_full(self) -> bool:
        """No padding."""
        return bool(self.attention_mask.all())

    def mask_or_none(self, device: torch.device) -> Tensor | None:
        """The attention mask, or None where it would mask nothing."""
        return None if self.is_full else self.attention_mask.to(device)


def _nothing(index: int) -> None:
    pass


class LayerWalk:
    """One model, one layer at a time, over all batches. The model is in memory as a whole.

    Attributes:
        streams: [batches] of [batch, seqlen, D]: what enters the next layer; on the way back, the gradients there.
    """

    def __init__(self, model: Any, family: FamilySpec, batches: Iterable[Batch], *, inputs: Path | None = None):
        """
        Args:
            model: of transformers, in evaluation.
            inputs: an empty folder for the layers' inputs, tokens x D x layers elements, without which there is no way back.
        """
        self.model, self.family, self.batches = model, family, list(batches)
        self.layers: list[nn.Module] = list(model.get_submodule(family.layers))
        self.streams: list[Tensor] = []
        self._arguments: list[list[dict[str, Any]]] = []
        self._inputs = inputs
        with torch.no_grad():
            for batch in self.batches:
                self._enter(batch)

    def _enter(self, batch: Batch) -> None:
        """The embeddings of a batch, and what the model would pass to each layer, found by letting none of them compute."""
        arguments: list[dict[str, Any]] = []
        hidden: list[Tensor] = []

        def note(hidden_states: Tensor, **keywords: Any) -> Tensor:
            hidden.append(hidden_states)
            arguments.append(keywords)
            return hidden_states

        with standing_in(self.layers, note):
            self._call(self.model.get_decoder(), batch)
        self.streams.append(hidden[0])
        self._arguments.append(arguments)

    def _call(self, module: Any, batch: Batch) -> Any:
        device = self.model.device
        return module(input_ids=batch.input_ids.to(device), attention_mask=batch.mask_or_none(device), use_cache=False)

    def attention(self, layer: int) -> nn.Module:
        """The attention module of a layer."""
        found: nn.Module = self.model.get_submodule(self.family.attention_name(layer))
        return found

    def run(self, layer: int, index: int, hidden: Tensor) -> Tensor:
        """One layer's output for a batch, whatever enters it."""
        output: Tensor = self.layers[layer](hidden, **self._arguments[index][layer])
        return output

    @torch.no_grad()
    def forward(self, layer: int, *, before: Step = _nothing, after: Step = _nothing) -> None:
        """All batches through one layer. Layers are walked in order.

        Args:
            before, after: called around each batch.
        """
        for index in range(len(self.batches)):
            before(index)
            if self._inputs is not None:
                self._keep(layer, index, self.streams[index])
            self.streams[index] = self.run(layer, index, self.streams[index])
            after(index)

    @contextmanager
    def backward_sweep(self, gradient: Callable[[Tensor, int], Tensor]) -> Iterator[None]:
        """From the last layer's outputs, to their gradients; `backward` follows, from the last layer to the first. Parameters get no gradients.

        Args:
            gradient: (logits [batch, seqlen, vocabulary], number of the batch) -> gradient of the loss there.

        Raises:
            CalibrationError: the backward pass failed.
        """
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.model.requires_grad_(False)
        try:
            for index, batch in enumerate(self.batches):
                with torch.enable_grad():
                    top = self.streams[index].detach().requires_grad_(True)
                    with standing_in(self.layers, lambda hidden, top=top, **keywords: top):
                        logits = self._call(self.model, batch).logits
                _backward(logits, gradient(logits.detach(), index))
                assert top.grad is not None
                self.streams[index] = top.grad
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)

    def backward(self, layer: int, *, before: Step = _nothing) -> None:
        """All batches through one layer again, and the gradients of its outputs back to its inputs.

        Args:
            before: called before each batch.

        Raises:
            CalibrationError: the layer cuts the gradient, or its backward pass failed.
        """
        for index in range(len(self.batches)):
            before(index)
            with torch.enable_grad():
                hidden = self._kept(layer, index).requires_grad_(True)
                output = self.run(layer, index, hidden)
            if not output.requires_grad:
                raise CalibrationError(f"layer {layer}: this model's forward cuts the gradient")
            _backward(output, self.streams[index])
            assert hidden.grad is not None
            self.streams[index] = hidden.grad

    def _path(self, layer: int, index: int) -> Path:
        assert self._inputs is not None, "a walk without inputs has no way back"
        return self._inputs / f"inputs_{layer}_{index}.safetensors"

    def _keep(self, layer: int, index: int, hidden: Tensor) -> None:
        path = self._path(layer, index)
        with writing(path):
            save_file({"hidden": hidden.cpu().contiguous()}, path)

    def _kept(self, layer: int, index: int) -> Tensor:
        path = self._path(layer, index)
        hidden = load_file(path)["hidden"].to(self.model.device)
        path.unlink()
        return hidden


def _backward(output: Tensor, gradient: Tensor) -> None:
    try:
        output.backward(gradient)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise CalibrationError(f"the model's backward pass failed ({str(error).splitlines()[0]})") from error


@contextmanager
def standing_in(modules: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """A function called in place of the modules for as long as the context lasts."""
    for module in modules:
        module.forward = forward
    try:
        yield
    finally:
        for module in modules:
            del module.forward  # the class's own again


def checkpoint_layers(model: Any, layers: Iterable[nn.Module]) -> None:
    """Layers keep their inputs alone and are run again in the backward pass, where a whole model is trained."""
    # The name changed within transformers 5.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for layer in layers:
        # The layer alone, so that it is checkpointed; its modules stay in evaluation, without dropout.
        layer.training = True
