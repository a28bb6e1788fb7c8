"""The project's own Hugging Face classes. Importing this registers them with AutoConfig and AutoModelForCausalLM."""

from care_mla.modeling.building import require_buildable, skeleton
from care_mla.modeling.cache import CACHE_NAME, LatentCache, cache_of
from care_mla.modeling.configuration import CareMlaConfig, converted_config, source_text_config
from care_mla.modeling.gguf import gguf_to_directory, require_gguf
from care_mla.modeling.inventory import Inventory, take_inventory
from care_mla.modeling.latent_attention import LatentAttention
from care_mla.modeling.model import LANGUAGE_MODEL, CareMlaForCausalLM, load, require_loadable, rotary_frequencies
from care_mla.modeling.stock import complete_config, matching_rotation, stock_shapes
from care_mla.modeling.verification import AttentionTrial, attention_trials

__all__ = [
    "CACHE_NAME",
    "LANGUAGE_MODEL",
    "AttentionTrial",
    "CareMlaConfig",
    "CareMlaForCausalLM",
    "Inventory",
    "LatentAttention",
    "LatentCache",
    "attention_trials",
    "cache_of",
    "complete_config",
    "converted_config",
    "gguf_to_directory",
    "load",
    "matching_rotation",
    "require_buildable",
    "require_gguf",
    "require_loadable",
    "rotary_frequencies",
    "skeleton",
    "source_text_config",
    "stock_shapes",
    "take_inventory",
]
