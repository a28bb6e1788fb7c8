"""Mistral 7B v0.1 (sliding window) to v0.3, Mistral-Nemo (head_dim apart from hidden / heads)."""

from care_mla.families.spec import FamilySpec

MISTRAL = FamilySpec(
    model_type="mistral",
    attention_kwargs={"sliding_window": "sliding_window"},
    config_defaults={"num_key_value_heads": 8, "sliding_window": None, "tie_word_embeddings": False},
    exports=("deepseek-v3",),
)
