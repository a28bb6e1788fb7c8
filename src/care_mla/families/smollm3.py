"""SmolLM3: every fourth layer without RoPE."""

from care_mla.families.spec import FamilySpec

SMOLLM3 = FamilySpec(
    model_type="smollm3",
    qkv_bias="attention_bias",
    use_rope="use_rope",
    rope_layers="no_rope_layers",
    attention_kwargs={"sliding_window": "sliding_window"},
    config_defaults={"num_key_value_heads": 4, "use_sliding_window": False, "tie_word_embeddings": True},
)
