"""Granite 3.x dense: multipliers on embeddings, residuals and logits, and one in place of the attention scale."""

from care_mla.families.spec import FamilySpec

GRANITE = FamilySpec(
    model_type="granite",
    qkv_bias="attention_bias",
    scale="attention_multiplier",
    residual_scale="residual_multiplier",
    config_defaults={"residual_multiplier": 1.0, "attention_multiplier": 1.0, "tie_word_embeddings": False},
)
