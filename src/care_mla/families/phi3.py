"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: q, k, v in one projection; longrope or plain RoPE, on a part of the head in Phi-4-mini."""

from care_mla.families.spec import FamilySpec

PHI3 = FamilySpec(
    model_type="phi3",
    qkv_proj="qkv_proj",
    attention_kwargs={"sliding_window": "config.sliding_window"},
    config_defaults={"tie_word_embeddings": False},
)
