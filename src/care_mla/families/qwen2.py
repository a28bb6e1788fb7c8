"""Qwen2 and Qwen2.5: biases on q, k and v; windows on the layers of `layer_types`."""

from care_mla.families.spec import FamilySpec

QWEN2 = FamilySpec(
    model_type="qwen2",
    qkv_bias=True,
    attention_kwargs={"sliding_window": "sliding_window"},
    config_defaults={"num_key_value_heads": 32, "use_sliding_window": False, "tie_word_embeddings": False},
    exports=("deepseek-v3",),
)
