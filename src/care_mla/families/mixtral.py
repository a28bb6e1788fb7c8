"""Mixtral 8x7B and 8x22B: Mistral with experts, which a conversion does not touch."""

from care_mla.families.spec import FamilySpec

MIXTRAL = FamilySpec(
    model_type="mixtral",
    attention_kwargs={"sliding_window": "config.sliding_window"},
    config_defaults={"num_key_value_heads": 8, "tie_word_embeddings": False},
)
