"""Qwen3 dense: every query and key head is normalized after its projection, before RoPE."""

from care_mla.families.spec import FamilySpec

QWEN3 = FamilySpec(
    model_type="qwen3",
    qkv_bias="attention_bias",
    q_norm="q_norm",
    k_norm="k_norm",
    attention_kwargs={"sliding_window": "sliding_window"},
    config_defaults={
        "num_key_value_heads": 32,
        "head_dim": 128,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
    },
    exports=("deepseek-v3",),
)
