"""Gemma 2: scores capped by tanh, every second layer windowed, its own attention scale. Norm weights are offsets from one."""

from care_mla.families.spec import FamilySpec

GEMMA2 = FamilySpec(
    model_type="gemma2",
    qkv_bias="attention_bias",
    scale="query_pre_attn_scalar",
    soft_cap="attn_logit_softcapping",
    full_attention_every=2,
    attention_kwargs={"sliding_window": "sliding_window", "softcap": "attn_logit_softcapping"},
    output_norm=True,
    config_defaults={
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
    },
    refused={"use_bidirectional_attention": "a cache of past tokens serves causal attention alone"},
)
