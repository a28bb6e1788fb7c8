"""Tiny random models, one configuration a family: head_dim apart from hidden / heads, random norms and biases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

COMMON: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
TINY: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-mha": {"model_type": "llama", "num_key_value_heads": 4},
    "llama-mqa-bias": {"model_type": "llama", "num_key_value_heads": 1, "attention_bias": True},
    "llama-scaled-rope": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "mistral": {"model_type": "mistral", "sliding_window": 8},
    "mixtral": {"model_type": "mixtral", "sliding_window": 8, "num_local_experts": 4},
    "qwen2": {"model_type": "qwen2", "head_dim": None},
    "qwen2-window": {
        "model_type": "qwen2",
        "head_dim": None,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3"},
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        "head_dim": None,
        **EXPERTS,
        "shared_expert_intermediate_size": 40,
        "mlp_only_layers": [1],
        "use_sliding_window": True,
        "sliding_window": 8,
    },
    "qwen3_moe": {"model_type": "qwen3_moe", **EXPERTS, "norm_topk_prob": True},
    "gemma2": {
        "model_type": "gemma2",
        "sliding_window": 8,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "sliding_window": 8,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 24,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 100000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "phi3": {"model_type": "phi3", "head_dim": None, "sliding_window": 8},
    "phi3-partial": {
        "model_type": "phi3",
        "head_dim": None,
        "original_max_position_embeddings": 16,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.67,
            "original_max_position_embeddings": 16,
            "short_factor": [1.0, 1.1, 1.2, 1.5],
            "long_factor": [1.0, 2.0, 4.0, 6.0],
        },
    },
    "olmo2": {"model_type": "olmo2"},
    "granite": {
        "model_type": "granite",
        "attention_multiplier": 0.3,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
    },
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 0, 1]},
    "smollm3-window": {
        "model_type": "smollm3",
        "no_rope_layers": [1, 0, 1],
        "use_sliding_window": True,
        "sliding_window": 8,
    },
    "gpt_oss": {"model_type": "gpt_oss", "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "starcoder2": {"model_type": "starcoder2", "head_dim": None, "sliding_window": 8},
    "qwen3-mqa-bias": {"model_type": "qwen3", "num_key_value_heads": 1, "attention_bias": True},
}


def tiny_model(name: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model whose logits depend on every weight: norms and biases are random too."""
    entries = {**COMMON, **TINY[name], **changes}
    entries = {key: value for key, value in entries.items() if value is not None}
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**entries)).eval()
    with torch.no_grad():
        for parameter_name, parameter in sorted(model.named_parameters()):
            if "norm" in parameter_name and parameter_name.endswith("weight"):
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
            else:
                scale = 0.2 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes and three special tokens; adds nothing by itself."""
    special = {"<bos>": 0, "<eos>": 1, "<pad>": 2}
    vocabulary = {**special, **{symbol: 3 + i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def write_tiny_model(directory: Path, name: str, **changes: Any) -> Path:
    """Save a tiny model with its tokenizer."""
    tiny_model(name, **changes).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def leave_out_figures(patch: pytest.MonkeyPatch) -> None:
    """Reports hold what their figures are told in place of the figures, which take longer to draw than a tiny model to convert."""

    def told(draw: Callable[[Any], None], **_: float) -> str:
        axes = MagicMock()
        draw(axes)
        return f"<svg><!-- {axes.mock_calls} --></svg>"

    patch.setattr("care_mla.report.figures._svg", told)
