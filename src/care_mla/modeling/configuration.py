"""Configuration of a converted model: the source's own config, and the width of every layer's latents."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from care_mla.ranks import RankPlan


@strict
class CareMlaConfig(PreTrainedConfig):
    """`model_type` care_mla.

    Attributes:
        text_config: configuration of the source model, as its family writes it.
        layout: "joint" (one latent for keys and values) or "split" (one each).
        kv_lora_rank: [num_layers] cached latent width of every layer, all blocks together.
        k_lora_rank: [num_layers] how many of these belong to the keys; None when joint.
        k_bias, v_bias: whether rebuilt keys and values have a bias.
    """

    model_type = "care_mla"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012  (transformers' own idiom)

    text_config: Any = None
    layout: str = "joint"
    kv_lora_rank: list[int] = field(default_factory=list)
    k_lora_rank: list[int] | None = None
    k_bias: bool = False
    v_bias: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.text_config, dict):
            text = dict(self.text_config)
            self.text_config = AutoConfig.for_model(text.pop("model_type"), **text)
        if self.text_config is None:
            self.text_config = AutoConfig.for_model("llama")
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        super().__post_init__(**kwargs)


def converted_config(
    source_config: dict[str, Any], plan: RankPlan, *, k_bias: bool, v_bias: bool, dtype: str
) -> dict[str, Any]:
    """config.json of a converted checkpoint; the source's own config is kept whole under `text_config`.

    Args:
        source_config: the source's config.json.
        dtype: of the written weights, e.g. "bfloat16".
    """
    text_config = {
        key: value
        for key, value in source_config.items()
        if key not in ("torch_dtype", "quantization_config", "auto_map")
    }
    joint = plan.layout == "joint"
    return {
        "model_type": CareMlaConfig.model_type,
        "architectures": ["CareMlaForCausalLM"],
        "dtype": dtype,
        "layout": plan.layout,
        "kv_lora_rank": [sum(ranks) for ranks in plan.ranks],
        "k_lora_rank": None if joint else [ranks[0] for ranks in plan.ranks],
        "k_bias": k_bias,
        "v_bias": v_bias,
        "text_config": {**text_config, "dtype": dtype},
    }
