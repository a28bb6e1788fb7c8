"""StarCoder2: biases on all projections, sliding window. Its residual dropout, of training alone, is not carried over."""

from care_mla.families.spec import FamilySpec

STARCODER2 = FamilySpec(
    model_type="starcoder2",
    qkv_bias="use_bias",
    attention_kwargs={"sliding_window": "config.sliding_window"},
    config_defaults={"num_key_value_heads": 2, "use_bias": True, "tie_word_embeddings": True},
)
