"""Configuration of a converted model: the source's own config, and the width of every layer's latents."""

from __future__ import annotations

from collections.abc import Collection, Mapping
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
        if isinstance(self.text_config, dict):
            text = dict(self.text_config)
            self.text_config = AutoConfig.for_model(text.pop("model_type"), **text)
        if self.text_config is None:
            self.text_config = AutoConfig.for_model("llama")
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        super().__post_init__(**kwargs)


def source_text_config(source_config: Mapping[str, Any]) -> dict[str, Any]:
    """What a converted model keeps of the source's config.json: all but how the source is stored and who else could run it."""
    dropped = ("torch_dtype", "quantization_config", "auto_map", "transformers_weights")
    return {key: value for key, value in source_config.items() if key not in dropped}


def converted_config(
    source_config: dict[str, Any],
    plan: RankPlan,
    *,
    biases: Collection[str],
    dtype: str,
    rope_frequencies: list[list[int]] | None = None,
    q_lora_rank: int | None = None,
    qk_norm: str = "exact",
) -> dict[str, Any]:
    """config.json of a converted checkpoint; the source's own config is kept whole under `text_config`.

    Args:
        source_config: the source's config.json.
        biases: names of the biases that every converted attention has.
        dtype: of the written weights, e.g. "bfloat16".
    """
    text_config = source_text_config(source_config)
    mla = {
        "o_bias": "o_proj.bias" in biases,
        "q_lora_rank": q_lora_rank,
        "q_bias": bool({"q_proj.bias", "q_b_proj.bias"} & set(biases)),
        "qk_norm": qk_norm,
        "rope_frequencies": rope_frequencies,
    }
    return {
        "model_type": CareMlaConfig.model_type,
        "architectures": ["CareMlaForCausalLM"],
        "dtype": dtype,
        "layout": plan.layout,
        "kv_lora_rank": [sum(ranks) for ranks in plan.ranks],
        "k_lora_rank": [ranks[0] for ranks in plan.ranks] if plan.layout == "split" else None,
        "k_bias": bool({"k_b_proj.bias", "kv_a_proj_with_mqa.bias"} & set(biases)),
        "v_bias": "v_b_proj.bias" in biases,
        **(mla if plan.layout == "mla" else {}),
        "text_config": {**text_config, "dtype": dtype},
    }
