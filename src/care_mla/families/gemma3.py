"""Gemma 3, text models: QK-norm, windowed layers between full ones, and two RoPE bases by layer type."""

from care_mla.families.spec import FamilySpec

GEMMA3 = FamilySpec(
    model_type="gemma3_text",
    qkv_bias="attention_bias",
    q_norm="q_norm",
    k_norm="k_norm",
    scale="query_pre_attn_scalar",
    rope_by_layer_type=True,
    full_attention_every="sliding_window_pattern",
    attention_kwargs={"sliding_window": "sliding_window"},
    output_norm=True,
    config_defaults={
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "tie_word_embeddings": True,
    },
    refused={"use_bidirectional_attention": "a cache of past tokens serves causal attention alone"},
)
