"""Llama 2 and 3.x, SmolLM, SmolLM2, TinyLlama, Yi and others of model_type llama."""

from care_mla.families.spec import FamilySpec

LLAMA = FamilySpec(
    model_type="llama",
    qkv_bias="attention_bias",
    config_defaults={"tie_word_embeddings": False},
    exports=("deepseek-v3",),
)
