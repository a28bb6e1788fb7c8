"""`CareMlaForCausalLM`: the source family's own model with every attention replaced by `LatentAttention`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from care_mla.checkpoint import resolve_source
from care_mla.errors import CheckpointError, ConfigError, UnsupportedModelError
from care_mla.families import get_family
from care_mla.files import read_json
from care_mla.layouts import get_layout
from care_mla.modeling.building import first_line, rotary_module, skeleton
from care_mla.modeling.cache import CACHE_NAME, LatentCache
from care_mla.modeling.configuration import CareMlaConfig
from care_mla.runtime import is_out_of_memory, memory_named, resolve_device, resolve_dtype

LANGUAGE_MODEL = "language_model"
"""Attribute of the wrapped source model, and the prefix of its weight names."""


class CareMlaForCausalLM(PreTrainedModel, GenerationMixin):
    """Composition: `language_model` is what transformers builds from the source's config; only attentions differ."""

    config_class = CareMlaConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012  (transformers' own idiom)

    def __init__(self, config: CareMlaConfig):
        config.require_consistent()
        super().__init__(config)
        family = get_family(config.text_config.to_dict())
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        # A device map must not cut through a decoder layer: its parts share a cache, a mask and the residual stream.
        self._no_split_modules = list(self.language_model._no_split_modules or [])
        rotary = self.language_model.get_submodule(family.rotary)
        attention = resolve_name(get_layout(config.layout).attention)
        for layer_idx, layer in enumerate(self.language_model.get_submodule(family.layers)):
            converted = attention(getattr(layer, family.attention), rotary, family, config, layer_idx)
            setattr(layer, family.attention, converted.to(self.language_model.dtype))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        self.language_model._init_weights(module)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_output_embeddings(value)

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
        if model_kwargs.get(CACHE_NAME) is not None or generation_config.use_cache is False:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
            return
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic", "offloaded"):
            raise ConfigError(
                f"cache_implementation={kind!r} is not available for latents; use 'dynamic' or 'offloaded'"
            )
        cache = LatentCache(config=self.config, offloading=kind == "offloaded")
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs[CACHE_NAME] = cache

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As the source model does it; one with longrope starts its cache anew where it passes its original length."""
        inputs: dict[str, Any] = self.language_model.prepare_inputs_for_generation(*args, **kwargs)
        return inputs

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: LatentCache | None = None,
        inputs_embeds: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: LatentCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As the source model's forward; `cache` is a `LatentCache` (made here when use_cache and absent).

        `past_key_values` is its other name, whichever of the two this version of transformers uses.
        """
        cache = past_key_values if cache is None else cache
        use_cache = self.config.text_config.use_cache if use_cache is None else use_cache
        if use_cache and cache is None:
            cache = LatentCache(config=self.config)
        if cache is not None:
            if not isinstance(cache, LatentCache):
                raise ConfigError(
                    f"the cache is a {type(cache).__name__}; a converted model needs care_mla.LatentCache(config=model.config)"
                )
            if get_layout(self.config.layout).caches_positions:
                tokens = inputs_embeds if input_ids is None else input_ids
                position_ids = cache.append_positions(tokens, position_ids)
        return self.language_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **{CACHE_NAME: cache},
            **kwargs,
        )


def require_loadable(directory: Path) -> None:
    """Refuse a config.json, of a source, a converted or an exported model, of which transformers makes no causal model.

    Takes a tenth of a second: nothing is allocated.

    Raises:
        CheckpointError, UnsupportedModelError: the entries that stand in the way.
    """
    skeleton(read_json(directory / "config.json"))


def rotary_frequencies(config: dict[str, Any]) -> Tensor:
    """Angles per position of a source's rotary pairs [F], as its own rotary module computes them (scaling included).

    Args:
        config: the source's config.json.

    Raises:
        UnsupportedModelError: frequencies that cover a part of the head only.
    """
    frequencies = cast(Tensor, rotary_module(config).inv_freq).double()
    head_dim = get_family(config).geometry(config).head_dim
    if 2 * len(frequencies) != head_dim:
        raise UnsupportedModelError(
            f"RoPE turns {2 * len(frequencies)} of {head_dim} head dimensions, which layout mla cannot express; choose --layout joint"
        )
    return frequencies


AutoConfig.register("care_mla", CareMlaConfig)
AutoModelForCausalLM.register(CareMlaConfig, CareMlaForCausalLM)


def load(
    source: str | Path,
    *,
    dtype: str | torch.dtype | None = "auto",
    device: str | int | torch.device | None = "cpu",
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a converted model, or any source model, for inference. Never runs code from the checkpoint.

    Args:
        source: directory or hub id.
        dtype: a torch dtype, its name, or "auto" (as stored), see `runtime.resolve_dtype`.
        device: where to, see `runtime.resolve_device`; None is the accelerator there is. With `device_map`, which says it by
            itself, it must be left out.
        kwargs: of transformers' `from_pretrained`, e.g. device_map, offload_folder, attn_implementation.

    Raises:
        ConfigError: a dtype or device that is unknown or not there, or more memory needed than there is.
        CheckpointError: unreadable, or weights missing from the checkpoint.
    """
    dtype = resolve_dtype(dtype, option="dtype")
    placed = kwargs.get("device_map") is not None
    if placed and str(device) != "cpu":
        raise ConfigError(f"device {device!r} and device_map both say where the model goes; give one of them")
    if placed and find_spec("accelerate") is None:
        raise ConfigError("device_map needs accelerate: pip install 'care-mla[heal]'")
    where = torch.device("cpu") if placed else resolve_device(device, option="device")
    directory = resolve_source(source)
    require_loadable(directory)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **{"ignore_mismatched_sizes": True, **kwargs},  # they are named below
        )
    except Exception as error:  # whatever transformers runs into: a directory that it cannot read
        if is_out_of_memory(error):
            raise ConfigError(
                f"out of memory while {source} was loaded: use a device with more of it, or a smaller --dtype"
            ) from error
        raise CheckpointError(f"{source} cannot be loaded: {first_line(error)}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise CheckpointError(
            f"{source}: {len(missing)} weights are missing from the checkpoint, the first is {missing[0]}"
        )
    if info["mismatched_keys"]:
        name, stored, expected = min(info["mismatched_keys"])
        raise CheckpointError(
            f"{source}: {name} has shape {tuple(stored)}, config.json asks for {tuple(expected)} ({len(info['mismatched_keys'])} such)"
        )
    if placed:
        return model.eval()
    with memory_named(f"{source} was loaded", where, "use --device cpu, or a smaller --dtype"):
        return model.to(where).eval()
