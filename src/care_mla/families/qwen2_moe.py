"""Qwen1.5-MoE and Qwen2-57B-A14B: biases on q, k and v; experts, which a conversion does not touch."""

from care_mla.families.spec import FamilySpec

QWEN2_MOE = FamilySpec(
    model_type="qwen2_moe",
    qkv_bias="qkv_bias",
    config_defaults={
        "num_key_value_heads": 16,
        "qkv_bias": True,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
    },
)
