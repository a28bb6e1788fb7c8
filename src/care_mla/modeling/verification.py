"""One attention beside transformers' own: same random weights, same hidden states, run where the source model runs it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from care_mla.errors import UnsupportedModelError
from care_mla.families import FamilySpec
from care_mla.modeling.configuration import CareMlaConfig
from care_mla.modeling.inventory import empty_model, own_config
from care_mla.modeling.latent_attention import LatentAttention

_TRACED = "care_mla_traced"
"""Attention implementation: the family's eager one, which notes on the module what it was given."""
_BATCH, _TOKENS = 2, 12


def _traced_attention(
    module: Any, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    module.given = {name: value for name, value in options.items() if value is not None}
    eager = getattr(module, "_eager", None) or sys.modules[type(module).__module__].eager_attention_forward
    attended: tuple[Tensor, Tensor | None] = eager(module, queries, keys, values, mask, **options)
    return attended


ALL_ATTENTION_FUNCTIONS.register(_TRACED, _traced_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(_TRACED, eager_mask)


class _Reached(Exception):  # noqa: N818  (no error: the rest of the model need not run)
    """Carries an attention's output out of the model."""

    def __init__(self, output: Tensor):
        super().__init__()
        self.output = output


class _PassedThrough(nn.Module):
    """In place of what lies before the attention: gives its input on, and answers for the attributes of what it replaces."""

    def __init__(self, original: nn.Module):
        super().__init__()
        for name, value in vars(original).items():
            if not name.startswith("_") and name != "training":
                setattr(self, name, value)

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


@dataclass
class AttentionTrial:
    """One layer's attention with random weights, in a model that has memory for nothing else.

    Attributes:
        weights: names inside the attention -> float32; norms and biases are random too, so that none of them goes unnoticed.
    """

    model: Any
    config: dict[str, Any]
    family: FamilySpec
    layer: int
    attention: nn.Module
    rotary: nn.Module
    weights: dict[str, Tensor] = field(default_factory=dict)

    def difference(self, converted: Mapping[str, Tensor]) -> float:
        """Relative difference of a converted attention's output from the source's own.

        Args:
            converted: weights of layout joint that are not the source's under the same name, by name inside the attention.

        Raises:
            UnsupportedModelError: the family spec passes other options to the attention function than the source does, or
                describes an attention that cannot be built or run.
        """
        own = self._output(self.attention)
        try:
            ours = self._converted(converted)
            output = self._output(ours)
        except Exception as error:  # the family's code with a spec that may be wrong in any way
            raise UnsupportedModelError(
                self._says(f"builds no attention that runs: {error} ({type(error).__name__})")
            ) from error
        self._require_same_options(self.attention, ours)
        return float((output - own).norm() / own.norm())

    def _converted(self, converted: Mapping[str, Tensor]) -> LatentAttention:
        num_layers, rank = self.layer + 1, len(converted["kv_a_proj.weight"])
        config = CareMlaConfig(
            text_config=dict(self.config),
            kv_lora_rank=[rank] * num_layers,
            k_bias="k_b_proj.bias" in converted,
            v_bias="v_b_proj.bias" in converted,
        )
        config.text_config._attn_implementation = _TRACED
        source = copy(self.attention)
        source._modules, source._parameters = dict(source._modules), dict(source._parameters)
        ours = LatentAttention(source, self.rotary, self.family, config, self.layer).eval()
        kept = {name: self.weights[name] for name in ours.state_dict() if name in self.weights}
        ours.load_state_dict({**kept, **{name: tensor.float() for name, tensor in converted.items()}})
        return ours

    def _output(self, attention: nn.Module) -> Tensor:
        """What the model's own forward gets from an attention in this layer."""
        layer = self.model.get_submodule(self.family.layers)[self.layer]
        setattr(layer, self.family.attention, attention)

        def stop(_: nn.Module, __: Any, output: Any) -> None:
            raise _Reached(output[0] if isinstance(output, tuple) else output)

        hook = attention.register_forward_hook(stop)
        hidden = torch.randn(_BATCH, _TOKENS, self.model.config.hidden_size, generator=torch.Generator().manual_seed(1))
        try:
            with torch.no_grad():
                self.model(inputs_embeds=hidden, use_cache=False)
        except _Reached as reached:
            return reached.output
        finally:
            hook.remove()
        raise UnsupportedModelError(
            self._says(f"names {self.family.attention} the attention, which the model never calls")
        )

    def _require_same_options(self, own: Any, ours: Any) -> None:
        theirs, given = getattr(own, "given", {}), getattr(ours, "given", {})
        for name in sorted(theirs.keys() | given.keys()):
            if not _same(theirs.get(name), given.get(name)):
                raise UnsupportedModelError(
                    self._says(
                        f"passes {name} = {_brief(given.get(name))} to the attention function, the model's own code {_brief(theirs.get(name))}; "
                        "see attention_kwargs and the entries for scale, soft-cap and sinks"
                    )
                )

    def _says(self, fault: str) -> str:
        return f"layer {self.layer}: the family spec of {self.family.model_type} {fault}"


def attention_trials(directory: Path, config: Mapping[str, Any], family: FamilySpec) -> Iterator[AttentionTrial]:
    """A trial of one layer of each kind: of a layer type, with or without RoPE, with weights of a shape.

    Args:
        directory: of the source's config.json; transformers' own side is read from it.
        config: what a converted model would be given of it (`text_config`).

    Raises:
        UnsupportedModelError: config.json means something else once it is part of a converted model, or the spec names modules
            that the model has not.
        CheckpointError: transformers does not build the model.
    """
    read = own_config(directory)
    _require_same_config(read, config)
    read._attn_implementation = _TRACED
    model = empty_model(directory, read, attn_implementation=_TRACED, dtype=torch.float32).eval()
    try:
        layers = model.get_submodule(family.layers)
        attentions = [layer.get_submodule(family.attention) for layer in layers]
        rotary = type(model.get_submodule(family.rotary))(config=read)
    except (AttributeError, TypeError) as error:
        raise UnsupportedModelError(
            f"the family spec of {family.model_type} names modules that the model has not: {error}"
        ) from error
    model.set_submodule(family.rotary, rotary)
    originals = list(layers)
    for index, layer in enumerate(originals):
        layers[index] = _PassedThrough(layer)
    for index in _one_of_each_kind(attentions, read):
        layer, attention = originals[index], attentions[index]
        for name, child in layer.named_children():
            if name != family.attention:
                setattr(layer, name, _PassedThrough(child))
        layers[index] = layer
        yield AttentionTrial(model, dict(config), family, index, attention, rotary, _fill(attention))
        layers[index] = _PassedThrough(layer)


def _one_of_each_kind(attentions: list[nn.Module], config: Any) -> list[int]:
    """Layers that together have every layer type, every set of weights, and every setting of an attention module."""
    types = getattr(config, "layer_types", None) or []
    first: dict[Any, int] = {}
    for index, attention in enumerate(attentions):
        shapes = tuple((name, tuple(tensor.shape)) for name, tensor in attention.state_dict(keep_vars=True).items())
        settings = tuple(
            (k, v) for k, v in vars(attention).items() if isinstance(v, int | float | str) and k != "layer_idx"
        )
        first.setdefault((types[index] if index < len(types) else None, settings, shapes), index)
    return sorted(first.values())


def _fill(attention: nn.Module) -> dict[str, Tensor]:
    """Give an attention of the meta device memory and random weights that keep scores and values near one."""
    attention.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for _, buffer in sorted(attention.named_buffers()):
        buffer.zero_()
    for _, parameter in sorted(attention.named_parameters()):
        parameter.requires_grad_(False)
        if parameter.ndim < 2:  # norms, biases, sinks
            parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
        else:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return dict(attention.state_dict())


_UNLIKE = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "auto_map"}
"""Entries that do not change what a model computes in a given precision."""


def _require_same_config(read: Any, config: Mapping[str, Any]) -> None:
    given = dict(config)
    rebuilt = AutoConfig.for_model(given.pop("model_type"), **given).to_dict()
    original = read.to_dict()
    for name in sorted((original.keys() | rebuilt.keys()) - _UNLIKE):
        if original.get(name) != rebuilt.get(name):
            raise UnsupportedModelError(
                f"config.json: {name} is {_brief(original.get(name))} for the source, but would be {_brief(rebuilt.get(name))} in a converted model"
            )


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape == second.shape and torch.allclose(first, second)
    return type(first) is type(second) and bool(first == second)


def _brief(value: Any) -> str:
    return f"a tensor of {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
