"""What the project must know of a model family. Data only; comparing model_type anywhere else is a bug."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from care_mla.errors import UnsupportedModelError
from care_mla.geometry import Geometry


@dataclass(frozen=True, kw_only=True)
class FamilySpec:
    """One model family, as transformers writes it.

    Attributes:
        model_type: as in config.json.
        layers: path of the decoder layers' list in the CausalLM, and prefix of their weight names.
        rotary: path of the rotary embedding module.
        attention: name of the attention module inside a layer.
        q_proj, k_proj, v_proj, o_proj: projection names inside the attention.
        qkv_bias: whether q, k and v have biases; a string names the config entry that says so.
        q_norm, k_norm: per-head norms after the projection (QK-norm), None where the family has none.
        attention_kwargs: what the family's attention passes to the attention function beyond the common arguments:
            keyword -> attribute of the attention module.
        config_defaults: values that the family's config class supplies when config.json omits them.
        refused: config entries that change attention in a way not expressed here: key -> reason. A truthy value refuses.
        required: config entries that must have the given value: key -> (value, reason).
        exports: stock targets of `care export` whose decoder layers equal this family's outside attention.
    """

    model_type: str
    layers: str = "model.layers"
    rotary: str = "model.rotary_emb"
    attention: str = "self_attn"
    q_proj: str = "q_proj"
    k_proj: str = "k_proj"
    v_proj: str = "v_proj"
    o_proj: str = "o_proj"
    qkv_bias: bool | str = False
    q_norm: str | None = None
    k_norm: str | None = None
    attention_kwargs: Mapping[str, str] = field(default_factory=dict)
    config_defaults: Mapping[str, Any] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    required: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    exports: tuple[str, ...] = ()

    def attention_name(self, layer: int) -> str:
        """Dotted name of a layer's attention module."""
        return f"{self.layers}.{layer}.{self.attention}"

    def geometry(self, config: Mapping[str, Any]) -> Geometry:
        """Read the geometry from config.json's entries.

        Raises:
            UnsupportedModelError: an entry is missing or inconsistent.
        """
        config = {**self.config_defaults, **{k: v for k, v in config.items() if v is not None}}
        try:
            num_heads = int(config["num_attention_heads"])
            geometry = Geometry(
                num_layers=int(config["num_hidden_layers"]),
                hidden_size=int(config["hidden_size"]),
                num_heads=num_heads,
                num_kv_heads=int(config.get("num_key_value_heads", num_heads)),
                head_dim=int(config.get("head_dim", int(config["hidden_size"]) // num_heads)),
            )
        except KeyError as error:
            raise UnsupportedModelError(
                f"config.json of this {self.model_type} model has no {error.args[0]}"
            ) from error
        if geometry.num_kv_heads < 1 or geometry.num_heads % geometry.num_kv_heads:
            raise UnsupportedModelError(
                f"{geometry.num_heads} query heads cannot be grouped over {geometry.num_kv_heads} key/value heads; config.json is inconsistent"
            )
        return geometry

    def check_config(self, config: Mapping[str, Any]) -> None:
        """Refuse, by name, what the layouts cannot express.

        Raises:
            UnsupportedModelError
        """
        for key, reason in self.refused.items():
            if config.get(key):
                raise UnsupportedModelError(
                    f"{self.model_type} with {key} = {config[key]!r} is not supported: {reason}"
                )
        for key, (value, reason) in self.required.items():
            if config.get(key, value) != value:
                raise UnsupportedModelError(
                    f"{self.model_type} with {key} = {config[key]!r} (not {value!r}) is not supported: {reason}"
                )

    def features(self, config: Mapping[str, Any]) -> dict[str, str]:
        """What a conversion must keep: feature -> how this model has it. Absent features are left out."""
        config = {**self.config_defaults, **config}
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        found = {
            "qkv bias": "q, k, v"
            if (config.get(self.qkv_bias) if isinstance(self.qkv_bias, str) else self.qkv_bias)
            else "",
            "QK-norm": "per head, before RoPE" if self.k_norm else "",
            "sliding window": _sliding_window(config),
            "RoPE scaling": rope.get("rope_type", rope.get("type", "default")),
            "tied embeddings": "lm_head = embed_tokens" if config.get("tie_word_embeddings") else "",
        }
        return {name: how for name, how in found.items() if how and how != "default"}


def _sliding_window(config: Mapping[str, Any]) -> str:
    if not config.get("sliding_window") or config.get("use_sliding_window") is False:
        return ""
    types = config.get("layer_types") or []
    local = types.count("sliding_attention")
    return f"{config['sliding_window']} tokens" + (f" in {local} of {len(types)} layers" if types else "")
