"""What the project must know of a model family. Data only; comparing model_type anywhere else is a bug."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from care_mla.errors import UnsupportedModelError
from care_mla.families.entries import check_entries, found, malformed
from care_mla.geometry import Geometry

LENGTH_DEPENDENT = ("dynamic", "longrope", "su")
"""RoPE kinds whose frequencies change with the length of the text."""

Projection = Literal["q", "k", "v", "o"]


@dataclass(frozen=True, kw_only=True)
class FamilySpec:
    """One model family, as transformers writes it.

    Attributes:
        model_type: as in config.json.
        layers: path of the decoder layers' list in the CausalLM, and prefix of their weight names.
        rotary: path of the rotary embedding module.
        attention: name of the attention module inside a layer.
        q_proj, k_proj, v_proj, o_proj: projection names inside the attention.
        qkv_proj: where q, k and v are one module, its name; rows are all of q, then k, then v. k_proj and v_proj mean nothing then,
            q_proj names the query rows after conversion.
        qkv_bias: whether q, k and v have biases; a string names the config entry that says so.
        q_norm, k_norm: norms after the projection and before RoPE (QK-norm), None where the family has none.
        qk_norm_over: what these normalize, each "head" or the whole "projection".
        scale: config entry of an attention scale other than head_dim^-1/2. The value is taken from the attention module.
        soft_cap: config entry of a cap on attention scores. Also in attention_kwargs, which passes it on.
        sinks: whether the attention has a parameter `sinks`, one extra logit a head, which transformers' attention functions read.
        masks_packed: whether transformers' model masks packed documents from each other where positions begin anew.
        use_rope: attribute of the attention module that is false in layers without RoPE.
        rope_layers: config entry with one flag a layer, 0 in those without RoPE.
        rope_by_layer_type: whether windowed and other layers turn at different frequencies, so that the rotary module asks for the
            layer's type.
        rope_interleaved: whether RoPE turns neighbouring dimensions (else a half of the head with the other).
        output_norm: whether the attention's output is normalized before it joins the residual stream.
        residual_scale: config entry of a factor on the attention's output where it joins the residual stream.
        full_attention_every: where config.json does not name `layer_types`, every so many layers one has no window; a string
            names the config entry that says how many.
        attention_kwargs: what the family's attention passes to the attention function beyond the common arguments:
            keyword -> attribute of the attention module, dots allowed.
        config_defaults: values that the family's config class supplies when config.json omits them.
        refused: config entries that change the model in a way not expressed here: key -> reason. A truthy value refuses.
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
    qkv_proj: str | None = None
    qkv_bias: bool | str = False
    q_norm: str | None = None
    k_norm: str | None = None
    qk_norm_over: Literal["head", "projection"] = "head"
    scale: str | None = None
    soft_cap: str | None = None
    sinks: bool = False
    masks_packed: bool = True
    use_rope: str | None = None
    rope_layers: str | None = None
    rope_by_layer_type: bool = False
    rope_interleaved: bool = False
    output_norm: bool = False
    residual_scale: str | None = None
    full_attention_every: int | str | None = None
    attention_kwargs: Mapping[str, str] = field(default_factory=dict)
    config_defaults: Mapping[str, Any] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    required: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    exports: tuple[str, ...] = ()

    def attention_name(self, layer: int) -> str:
        """Dotted name of a layer's attention module."""
        return f"{self.layers}.{layer}.{self.attention}"

    def stored(self, projection: Projection, geometry: Geometry) -> tuple[str, slice]:
        """Where a projection is: its module inside the attention, and its rows there."""
        if self.qkv_proj is None or projection == "o":
            return str(getattr(self, f"{projection}_proj")), slice(None)
        q, kv = geometry.num_heads * geometry.head_dim, geometry.kv_width
        rows = {"q": slice(0, q), "k": slice(q, q + kv), "v": slice(q + kv, q + 2 * kv)}
        return self.qkv_proj, rows[projection]

    def geometry(self, config: Mapping[str, Any]) -> Geometry:
        """Read the geometry from config.json's entries.

        Raises:
            UnsupportedModelError: an entry is missing or inconsistent.
        """
        config = self._complete(config)
        try:
            num_heads = int(config["num_attention_heads"])
            geometry = Geometry(
                num_layers=int(config["num_hidden_layers"]),
                hidden_size=int(config["hidden_size"]),
                num_heads=num_heads,
                num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
                head_dim=int(config.get("head_dim") or int(config["hidden_size"]) // num_heads),
            )
        except KeyError as error:
            raise UnsupportedModelError(
                f"config.json of this {self.model_type} model has no {error.args[0]}"
            ) from error
        if geometry.num_kv_heads < 1 or geometry.num_heads % geometry.num_kv_heads:
            raise UnsupportedModelError(
                f"config.json: num_attention_heads = {geometry.num_heads} query heads cannot be grouped over num_key_value_heads = {geometry.num_kv_heads}"
            )
        if geometry.head_dim < 1 or geometry.head_dim % 2:
            raise malformed(
                "hidden_size / num_attention_heads", geometry.head_dim, "even: RoPE turns dimensions in pairs"
            )
        return geometry

    def check_config(self, config: Mapping[str, Any]) -> None:
        """Refuse, by name, entries that cannot be read and what no layout can express.

        Raises:
            CheckpointError: an entry, what it holds and what is needed.
            UnsupportedModelError
        """
        flags = (self.qkv_bias,) if isinstance(self.qkv_bias, str) else ()
        counts = (self.full_attention_every,) if isinstance(self.full_attention_every, str) else ()
        check_entries(config, flags=flags, counts=counts, rope_flags=self.rope_layers)
        if config.get("per_layer_config"):
            raise UnsupportedModelError(
                f"{self.model_type} with per_layer_config is not supported: layers must be alike in their attention"
            )
        if quantization := config.get("quantization_config"):
            raise UnsupportedModelError(
                f"the weights of this {self.model_type} model are quantized ({found('quant_method', quantization.get('quant_method', '?'))}), and low-rank maps need "
                "them as they are; load it dequantized, in bfloat16, and convert what save_pretrained writes"
            )
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
        config = self._complete(config)
        kinds = _rope_kinds(config)
        rotary_share = _rotary_share(config)
        found = {
            "fused qkv": self.qkv_proj or "",
            "qkv bias": "q, k, v"
            if (config.get(self.qkv_bias) if isinstance(self.qkv_bias, str) else self.qkv_bias)
            else "",
            "QK-norm": "per head, before RoPE" if self.k_norm and self.qk_norm_over == "head" else "",
            "QK-norm over the projection": "before RoPE" if self.k_norm and self.qk_norm_over == "projection" else "",
            "attention scale": f"{self.scale} = {config.get(self.scale)}" if self.scale else "",
            "soft-cap": f"scores within {config[self.soft_cap]}" if self.soft_cap and config.get(self.soft_cap) else "",
            "attention sinks": "one extra logit a head" if self.sinks else "",
            "sliding window": self._sliding_window(config),
            "RoPE scaling": ", ".join(kinds),
            "length-dependent RoPE": ", ".join(kind for kind in kinds if kind in LENGTH_DEPENDENT),
            "partial RoPE": f"{rotary_share:.0%} of every head" if rotary_share < 1 else "",
            "interleaved RoPE": "neighbouring dimensions turn together" if self.rope_interleaved else "",
            "RoPE by layer type": "windowed layers turn at other frequencies" if self.rope_by_layer_type else "",
            "layers without RoPE": self._layers_without_rope(config),
            "tied embeddings": "lm_head = embed_tokens" if config.get("tie_word_embeddings") else "",
        }
        return {name: how for name, how in found.items() if how}

    def _complete(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {**self.config_defaults, **config}

    def _sliding_window(self, config: Mapping[str, Any]) -> str:
        if not config.get("sliding_window") or config.get("use_sliding_window") is False:
            return ""
        types = config.get("layer_types")
        if types is None and self.full_attention_every is not None:
            every = self.full_attention_every
            every = config[every] if isinstance(every, str) else every
            layers = range(1, int(config.get("num_hidden_layers", 0)) + 1)
            types = ["sliding_attention" if layer % every else "full_attention" for layer in layers]
        if not types:
            return f"{config['sliding_window']} tokens" + (" in some layers" if self.full_attention_every else "")
        local = types.count("sliding_attention")
        return f"{config['sliding_window']} tokens in {local} of {len(types)} layers" if local else ""

    def _layers_without_rope(self, config: Mapping[str, Any]) -> str:
        if self.rope_layers is None:
            return ""
        flags = config.get(self.rope_layers)
        if not flags:
            return f"as {self.rope_layers} says"
        return f"{flags.count(0)} of {len(flags)}" if 0 in flags else ""


def _rope_parameters(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The config's RoPE settings, one for each layer type that has its own.

    Of a config that is written in two styles transformers takes `rope_scaling`; where `rope_parameters` has settings by layer
    type, it joins those of full attention.
    """
    parameters, scaling = (_mapping(config.get(key)) for key in ("rope_parameters", "rope_scaling"))
    nested = {kind: value for kind, value in parameters.items() if isinstance(value, Mapping)}
    if nested:
        return [{**value, **scaling} if kind == "full_attention" else value for kind, value in nested.items()]
    rope = scaling or parameters
    return [value for value in rope.values() if isinstance(value, Mapping)] or [rope]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _rope_kinds(config: Mapping[str, Any]) -> list[str]:
    """Kinds of RoPE scaling other than none, as config.json names them."""
    kinds = {str(rope.get("rope_type", rope.get("type", "default"))) for rope in _rope_parameters(config)}
    return sorted(kinds - {"default"})


def _rotary_share(config: Mapping[str, Any]) -> float:
    """Share of a head's dimensions that RoPE turns."""
    given = [rope["partial_rotary_factor"] for rope in _rope_parameters(config) if "partial_rotary_factor" in rope]
    return float(min(given, default=config.get("partial_rotary_factor") or 1.0))
