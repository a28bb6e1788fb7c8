"""Qwen3 with experts, which a conversion does not touch: the attention of Qwen3."""

from care_mla.families.spec import FamilySpec

QWEN3_MOE = FamilySpec(
    model_type="qwen3_moe",
    qkv_bias="attention_bias",
    q_norm="q_norm",
    k_norm="k_norm",
    attention_kwargs={"sliding_window": "sliding_window"},
    config_defaults={"num_key_value_heads": 4, "use_sliding_window": False, "tie_word_embeddings": False},
)
