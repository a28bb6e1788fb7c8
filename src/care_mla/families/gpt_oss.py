"""gpt-oss: attention sinks, biases everywhere, alternating windows. Released in mxfp4, which is refused; a dequantized copy converts."""

from care_mla.families.spec import FamilySpec

GPT_OSS = FamilySpec(
    model_type="gpt_oss",
    qkv_bias="attention_bias",
    sinks=True,
    masks_packed=False,
    full_attention_every=2,
    attention_kwargs={"sliding_window": "sliding_window"},
    config_defaults={
        "num_key_value_heads": 8,
        "head_dim": 64,
        "attention_bias": True,
        "sliding_window": 128,
        "tie_word_embeddings": False,
    },
)
