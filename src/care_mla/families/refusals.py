"""Why a model without a spec cannot be converted, as far as its config.json tells: it has MLA already, has no attention, is a wrapper ..."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

INNER = ("text_config", "language_config", "llm_config", "language_model_config", "thinker_config")
"""Where wrappers keep the config of their text model."""
OTHER_SENSES = ("vision_config", "audio_config", "vision_encoder_config", "img_processor", "visual", "embd_layer")
WRAPPERS = ("gemma3n", "gemma4", "llama4", "mllama", "phi3_v", "phi4mm", "phi4_multimodal", "qwen2_vl", "qwen2_5_vl")

LATENT = (
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "deepseek_vl_v2",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "kimi_k2",
    "longcat_flash",
    "minicpm3",
    "mistral4",
    "youtu",
)
"""Model types of which every checkpoint has MLA, for a config.json that leaves kv_lora_rank to its class."""

RECURRENT = ("mamba", "mamba2", "falcon_mamba", "rwkv", "rwkv5", "rwkv6", "rwkv7", "retnet", "xlstm")
HYBRID = (
    "bamba",
    "falcon_h1",
    "jamba",
    "kimi_linear",
    "lfm2",
    "lfm2_moe",
    "minimax",
    "nemotron_h",
    "olmo_hybrid",
    "plamo2",
    "qwen3_next",
    "qwen3_5",
    "qwen3_5_text",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "recurrent_gemma",
    "zamba",
    "zamba2",
)
HYBRID_ENTRIES = (
    "hybrid_override_pattern",
    "mamba_num_heads",
    "mamba_d_state",
    "linear_num_value_heads",
    "attn_layer_period",
)
WITHOUT_ATTENTION = ("linear_attention", "mamba", "conv", "recurrent", "lightning_attention")
"""Beginnings of words in `layer_types` and its older names."""

ENCODERS = (
    "albert",
    "bert",
    "camembert",
    "deberta",
    "deberta-v2",
    "distilbert",
    "electra",
    "eurobert",
    "modernbert",
    "mpnet",
    "nomic_bert",
    "roberta",
    "xlm-roberta",
    "vit",
    "clip",
    "siglip",
)
SEQUENCE_TO_SEQUENCE = (
    "t5",
    "mt5",
    "umt5",
    "longt5",
    "t5gemma",
    "bart",
    "mbart",
    "pegasus",
    "marian",
    "m2m_100",
    "whisper",
    "led",
)


def why_not(config: Mapping[str, Any]) -> str:
    """The reason in half a sentence that goes on after "this model"; empty where config.json names none.

    Args:
        config: of a model type without a spec.
    """
    model_type, inner = config["model_type"], next((name for name in INNER if isinstance(config.get(name), dict)), None)
    if inner is not None:
        return (
            f"wraps a text model ({inner}) and more, and a conversion takes text models alone{_inside(config[inner])}"
        )
    if model_type in WRAPPERS or any(config.get(name) for name in OTHER_SENSES):
        return "reads more than text, and a conversion takes text models alone"
    if model_type in LATENT or config.get("kv_lora_rank"):
        rank = f" (kv_lora_rank = {config['kv_lora_rank']})" if config.get("kv_lora_rank") else ""
        return f"has Multi-head Latent Attention already{rank}: there is nothing to convert"
    if config.get("compress_ratios") and config.get("o_lora_rank"):
        return "caches one compressed entry for all heads already (compress_ratios): there is nothing to convert"
    if model_type in RECURRENT:
        return "has no attention: its state does not grow with the text, so there is no cache to convert"
    if lacking := _layers_without_attention(config):
        return f"has layers without attention ({lacking}), and a conversion takes models whose layers all have it"
    if model_type in ENCODERS or any(_names_encoder(name) for name in config.get("architectures") or ()):
        return "is an encoder: it sees the whole text at once and caches nothing"
    if config.get("is_encoder_decoder") is True or model_type in SEQUENCE_TO_SEQUENCE:
        return "is an encoder and a decoder, and a conversion takes models of decoder layers alone"
    if config.get("block_configs") or config.get("per_layer_config"):
        return "has layers that differ in their attention, and a conversion takes models whose layers are alike"
    return ""


def _inside(text_config: Mapping[str, Any]) -> str:
    """What is to say of a wrapped text model."""
    model_type = text_config.get("model_type")
    if not isinstance(model_type, str):
        return ""
    reason = why_not(text_config)
    return f"; its text model ({model_type}) {reason}" if reason else f"; its text model is a {model_type}"


def _layers_without_attention(config: Mapping[str, Any]) -> str:
    """What tells that some layers have no attention; empty where nothing does."""
    for name in ("layer_types", "layers_block_type", "block_types"):
        types = config.get(name)
        if isinstance(types, list) and all(isinstance(word, str) for word in types):  # says it of every layer
            return next((f"{name}: {word}" for word in types if word.startswith(WITHOUT_ATTENTION)), "")
    entry = next((name for name in HYBRID_ENTRIES if config.get(name)), None)
    return entry or (config["model_type"] if config["model_type"] in HYBRID else "")


def _names_encoder(architecture: str) -> bool:
    return architecture.endswith(("ForMaskedLM", "BertModel"))
