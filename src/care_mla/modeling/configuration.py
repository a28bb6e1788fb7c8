"""Configuration of a converted model: the source's own config, and the width of every layer's latents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from care_mla.errors import CheckpointError
from care_mla.families.entries import found, malformed
from care_mla.layouts import LAYOUTS
from care_mla.modeling.building import complete

OF_SOURCE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
"""What others ask a config for and the source's answers: read from `text_config` and set there, so that both never differ."""


@strict
class CareMlaConfig(PreTrainedConfig):
    """`model_type` care_mla. Entries of `OF_SOURCE` that the source has are those of `text_config`.

    Attributes:
        text_config: configuration of the source model, as its family writes it.
        layout: "joint" (one latent for keys and values), "split" (one each) or "mla" (one, and a shared rotary key).
        kv_lora_rank: [num_layers] cached latent width of every layer, all blocks together.
        k_lora_rank: [num_layers] how many of these belong to the keys; None when joint.
        k_bias, v_bias: whether rebuilt keys (mla: the rotary key) and values have a bias.
        o_bias: whether o_proj has a bias; layout mla, else the source's own.
        q_lora_rank: rank of the queries, whose projections are q_a_proj and q_b_proj then; None: exact queries. Layout mla.
        q_bias: whether queries have a bias; None: as the source's. Layout mla.
        qk_norm: "exact", with the source's norms, or "linear", where projections stand for them. Layout mla.
        rope_frequencies: [num_layers][qk_rope_head_dim / 2] index into the source's frequencies of every rotary pair; mla.
    """

    model_type = "care_mla"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012  (transformers' own idiom)

    text_config: Any = None
    layout: str = "joint"
    kv_lora_rank: list[int] = field(default_factory=list)
    k_lora_rank: list[int] | None = None
    k_bias: bool = False
    v_bias: bool = False
    o_bias: bool = False
    q_lora_rank: int | None = None
    q_bias: bool | None = None
    qk_norm: str = "exact"
    rope_frequencies: list[list[int]] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.text_config is None:
            self.text_config = AutoConfig.for_model("llama")
        if isinstance(self.text_config, dict):
            self.text_config = complete(self.text_config)
        if not isinstance(self.text_config, PreTrainedConfig):
            raise malformed("text_config", self.text_config, "the config of the model that was converted")
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        for name in OF_SOURCE:
            if name in kwargs and kwargs.pop(name) != (inner := getattr(self.text_config, name, None)):
                raise CheckpointError(
                    f"config.json: text_config has {found(name, inner)}, and another value stands beside it"
                )
        super().__post_init__(**kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in OF_SOURCE and isinstance(self.text_config, PreTrainedConfig):
            return getattr(self.text_config, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OF_SOURCE and isinstance(self.text_config, PreTrainedConfig):
            setattr(self.text_config, name, value)
        else:
            super().__setattr__(name, value)

    def require_consistent(self) -> None:
        """The entries of a conversion fit each other and the layers.

        Raises:
            CheckpointError: an entry, what it holds and what is needed.
        """
        if self.layout not in LAYOUTS:
            raise malformed("layout", self.layout, f"one of {', '.join(LAYOUTS)}")
        LAYOUTS[self.layout].require_entries(self)


def source_text_config(source_config: Mapping[str, Any]) -> dict[str, Any]:
    """What a converted model keeps of the source's config.json: all but how the source is stored and who else could run it."""
    dropped = ("torch_dtype", "quantization_config", "auto_map", "transformers_weights")
    return {key: value for key, value in source_config.items() if key not in dropped}


def converted_config(
    source_config: dict[str, Any], layout: str, entries: Mapping[str, Any], *, dtype: str
) -> dict[str, Any]:
    """config.json of a converted checkpoint; the source's own config is kept whole under `text_config`.

    Args:
        source_config: the source's config.json.
        layout: its name.
        entries: `Layout.config_entries`.
        dtype: of the written weights, e.g. "bfloat16".
    """
    return {
        "model_type": CareMlaConfig.model_type,
        "architectures": ["CareMlaForCausalLM"],
        "dtype": dtype,
        "layout": layout,
        **entries,
        "text_config": {**source_text_config(source_config), "dtype": dtype},
    }
