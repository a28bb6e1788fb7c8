"""OLMo 2: queries and keys normalized over the whole projection, norms after the sublayers."""

from care_mla.families.spec import FamilySpec

OLMO2 = FamilySpec(
    model_type="olmo2",
    qkv_bias="attention_bias",
    q_norm="q_norm",
    k_norm="k_norm",
    qk_norm_over="projection",
    output_norm=True,
    config_defaults={"tie_word_embeddings": False},
)
