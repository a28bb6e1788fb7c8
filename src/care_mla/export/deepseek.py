"""Stock target `deepseek-v3`: layout `mla` as a dense checkpoint of DeepseekV3ForCausalLM, loaded without custom code.

Four things differ from the project's own classes, each made good in the weights, so that nothing is approximated:
- kv_a_layernorm (and q_a_layernorm) cannot be left out: rows of 2^-40 make its mean square vanish beside eps, which leaves
  c / sqrt(eps) * w, a constant; w takes its power of two and the next projection the rest (`IDENTITY_NORM`).
- transformers gives these norms eps 1e-6 whatever the config says, vLLM and SGLang use rms_norm_eps. So rms_norm_eps must
  be 1e-6: the residual stream shrinks by a = sqrt(1e-6 / eps), RMSNorm(a x; a^2 eps) = RMSNorm(x; eps).
- rotary dimensions are interleaved: pair p is (2p, 2p + 1), not (p, p + P).
- scores are divided by sqrt(d_nope + d_rope), not by sqrt(d): W_Q takes the ratio.

Source: DeepSeek-V2 (arXiv 2405.04434) for the architecture; transformers' modeling_deepseek_v3 for names and conventions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from care_mla.errors import ConfigError, RankError, UnsupportedModelError
from care_mla.export.engines import EXPRESSES, VLLM_WIDTHS, Engine

EMBEDDING = "model.embed_tokens.weight"
REQUIRED = ("kv_a_proj_with_mqa.weight", "kv_b_proj.weight", "o_proj.weight")
"""What `attention_tensors` cannot do without, beside `query_weights`."""


def query_weights(q_lora_rank: int | None) -> tuple[str, ...]:
    """Weights of the queries that a converted attention has."""
    return ("q_proj.weight",) if q_lora_rank is None else ("q_a_proj.weight", "q_b_proj.weight")


NORM_EPS = 1e-6
SHRUNK = 2.0**-40
"""Scale of rows in front of a norm that must not normalize: mean squares up to 1e9 stay below 1e-9 of eps, far from underflow."""
NORM_WEIGHT = 2.0**30
NORM_GAIN = SHRUNK * NORM_WEIGHT / math.sqrt(NORM_EPS)
"""What shrunk rows, norm and norm weight amount to; the following projection is divided by it."""


def residual_scale(eps: float) -> float:
    """a of the residual stream that turns a source's RMSNorm eps into 1e-6."""
    return math.sqrt(NORM_EPS / eps)


def padded_rank(ranks: Sequence[int], qk_rope_head_dim: int, engine: Engine, kv_lora_rank: int | None = None) -> int:
    """The one latent width of all layers; narrower latents are padded with zeros, which is exact but spends cache.

    Args:
        ranks: latent width of every layer.
        kv_lora_rank: asked for; None is the least that the engine takes.

    Raises:
        RankError: no such width.
    """
    widest = max(ranks)
    if kv_lora_rank is not None and kv_lora_rank < widest:
        raise RankError(f"--kv-lora-rank {kv_lora_rank} is less than the widest latent of the model, {widest}")
    if engine == "transformers":
        return widest if kv_lora_rank is None else kv_lora_rank
    allowed = [width - qk_rope_head_dim for width in VLLM_WIDTHS if width - qk_rope_head_dim >= widest]
    if kv_lora_rank is None and allowed:
        return allowed[0]
    if kv_lora_rank not in allowed:
        asked = f"a latent of {widest if kv_lora_rank is None else kv_lora_rank}"
        raise RankError(
            f"--engine vllm takes latent + rotary key of {', '.join(map(str, VLLM_WIDTHS))}; "
            f"{asked} beside a rotary key of {qk_rope_head_dim} fits none (latents: {allowed or 'none'})"
        )
    assert kv_lora_rank is not None
    return kv_lora_rank


def require_stock_frequencies(frequencies: Sequence[Sequence[int]], num_frequencies: int) -> None:
    """Every layer must turn the pairs that an engine generates from rope_theta and qk_rope_head_dim.

    Raises:
        UnsupportedModelError
    """
    pairs = len(frequencies[0])
    stock = list(range(0, num_frequencies, num_frequencies // pairs)) if num_frequencies % pairs == 0 else []
    if any(list(layer) != stock for layer in frequencies):
        raise UnsupportedModelError(
            "the rotary pairs of this model were chosen freely, a stock class generates them from rope_theta: convert with --rope stock"
        )


def _interleaved(rotary: Float[Tensor, "... P2 D"]) -> Float[Tensor, "... P2 D"]:
    """Rows (all real parts, all imaginary parts) -> pairs side by side."""
    real, imaginary = rotary.chunk(2, dim=-2)
    return torch.stack([real, imaginary], dim=-2).flatten(-3, -2)


def _two_query_maps(
    query_down: Float[Tensor, "r D"], queries: Float[Tensor, "m r1"], *, constant: bool
) -> dict[str, Tensor]:
    """q_a_proj, an identity q_a_layernorm and q_b_proj of queries(query_down x), or queries([query_down x ; 1])."""
    rank, width = query_down.shape
    result = {"q_a_proj.weight": SHRUNK * query_down}
    if constant:
        one = query_down.new_zeros(rank + 1)
        one[-1] = SHRUNK
        result = {
            "q_a_proj.weight": torch.cat([SHRUNK * query_down, query_down.new_zeros(1, width)]),
            "q_a_proj.bias": one,
        }
    return {
        **result,
        "q_a_layernorm.weight": query_down.new_full((rank + constant,), NORM_WEIGHT),
        "q_b_proj.weight": queries / NORM_GAIN,
    }


def attention_tensors(
    tensors: Mapping[str, Tensor],
    *,
    kv_lora_rank: int,
    qk_rope_head_dim: int,
    num_heads: int,
    head_dim: int,
    eps: float,
    biased: bool,
    attention_scaling: float = 1.0,
) -> dict[str, Tensor]:
    """Weights of one DeepseekV3Attention by name, float64, from those of `layouts.mla.mla_tensors`.

    Args:
        kv_lora_rank: width to pad the latent to.
        eps: of the source's norms.
        biased: whether the target has attention_bias, as it must if any of its layers has one.
        attention_scaling: factor of cos and sin (YaRN); position-free scores need its square.
    """
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    own = "q_b_proj" if "q_b_proj.weight" in wide else "q_proj"
    q, q_bias, down = wide[f"{own}.weight"], wide.get(f"{own}.bias"), wide["kv_a_proj_with_mqa.weight"]
    hidden_size, rank = down.shape[1], len(down) - qk_rope_head_dim
    padding = kv_lora_rank - rank
    if q_bias is not None:
        q = torch.cat([q, q_bias[:, None]], dim=1)
    heads = q.view(num_heads, head_dim + qk_rope_head_dim, -1) * math.sqrt(1.0 + qk_rope_head_dim / head_dim)
    position_free = heads[:, :head_dim] * attention_scaling**2
    queries = torch.cat([position_free, _interleaved(heads[:, head_dim:])], dim=1).flatten(0, 1)

    nothing = down.new_zeros(padding, hidden_size)
    up = wide["kv_b_proj.weight"] / NORM_GAIN
    scale = residual_scale(eps)
    result = {
        "kv_a_proj_with_mqa.weight": torch.cat([SHRUNK * down[:rank], nothing, _interleaved(down[rank:])]),
        "kv_a_layernorm.weight": down.new_full((kv_lora_rank,), NORM_WEIGHT),
        "kv_b_proj.weight": torch.cat([up, up.new_zeros(len(up), padding)], dim=1),
        "o_proj.weight": scale * wide["o_proj.weight"],
    }
    if q_bias is None and "q_a_proj.weight" not in wide:
        result["q_proj.weight"] = queries
    else:
        query_down = wide.get("q_a_proj.weight", torch.eye(hidden_size, dtype=down.dtype))
        result |= _two_query_maps(query_down, queries, constant=q_bias is not None)
    if biased:
        if "q_a_proj.weight" in result:
            result.setdefault("q_a_proj.bias", down.new_zeros(len(result["q_a_proj.weight"])))
        rotary_bias = wide.get("kv_a_proj_with_mqa.bias", down.new_zeros(len(down)))[rank:]
        result["kv_a_proj_with_mqa.bias"] = torch.cat(
            [down.new_zeros(kv_lora_rank), _interleaved(rotary_bias[:, None])[:, 0]]
        )
        result["o_proj.bias"] = scale * wide.get("o_proj.bias", down.new_zeros(len(wide["o_proj.weight"])))
    return result


def deepseek_config(
    source: Mapping[str, Any],
    *,
    kv_lora_rank: int,
    qk_rope_head_dim: int,
    num_heads: int,
    head_dim: int,
    biased: bool,
    query_bias: bool,
    dtype: str,
    q_lora_rank: int | None = None,
) -> dict[str, Any]:
    """config.json of the stock checkpoint.

    Args:
        source: the source model's config, complete: entries that config.json may omit, and rope_parameters.
        query_bias: whether queries have a bias, which needs q_a_proj in front of them.
        q_lora_rank: of the converted model; None: exact queries.
    """
    query_rank = q_lora_rank if q_lora_rank is not None or not query_bias else source["hidden_size"]
    kept = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act", "max_position_embeddings",
        "initializer_range", "attention_dropout", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    rope_parameters = source["rope_parameters"]
    return {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "dtype": dtype,
        **{key: source[key] for key in kept if key in source},
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads,
        "kv_lora_rank": kv_lora_rank,
        "q_lora_rank": None if query_rank is None else query_rank + query_bias,
        "qk_nope_head_dim": head_dim,
        "qk_rope_head_dim": qk_rope_head_dim,
        "v_head_dim": head_dim,
        "attention_bias": biased,
        "rms_norm_eps": NORM_EPS,
        "rope_interleave": True,
        "rope_theta": rope_parameters["rope_theta"],
        "rope_parameters": dict(rope_parameters),
        "tie_word_embeddings": False,
        # Every layer dense: the entries of a mixture of experts only have to be valid.
        "first_k_dense_replace": source["num_hidden_layers"],
        "moe_layer_freq": 1,
        "moe_intermediate_size": source["intermediate_size"],
        "n_routed_experts": 1,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "num_nextn_predict_layers": 0,
    }


def converted_features(features: Mapping[str, str], config: Mapping[str, Any]) -> dict[str, str]:
    """Features of a source (`FamilySpec.features`) that its conversion still has.

    Args:
        config: config.json of the converted model.
    """
    result = dict(features)
    if config.get("qk_norm") == "linear":
        del result["QK-norm"]
        result.pop("qkv bias", None)
        if config["q_bias"] or config["k_bias"]:
            result["qkv bias"] = "what linearized norms amount to"
    return result


def require_holdable(features: Mapping[str, str], *, engine: Engine, dtype: str, o_bias: bool) -> None:
    """Refuse by name what the target cannot hold.

    Args:
        features: of the converted model, see `converted_features`.

    Raises:
        UnsupportedModelError: the sentence names what can.
    """
    lost = [feature for feature in features if feature not in EXPRESSES[engine]]
    if lost:
        able = [name for name, kept in EXPRESSES.items() if set(lost) <= set(kept)]
        instead = (
            "use --engine transformers (vLLM loads that with --model-impl transformers)"
            if able
            else "serve the converted directory itself, with care_mla's classes"
        )
        if lost == ["QK-norm"]:
            instead += ", or convert with --qk-norm linear"
        raise UnsupportedModelError(
            f"{', '.join(lost)}: a stock DeepSeek checkpoint for {engine} cannot hold it; {instead}"
        )
    if engine == "vllm" and o_bias:
        raise UnsupportedModelError(
            "o_proj has a bias (the constant part of centred values), which vLLM's own model drops: convert with --no-centre, "
            "or use --engine transformers"
        )
    if dtype == "float16":
        raise ConfigError(
            "a stock DeepSeek checkpoint in float16 underflows in front of kv_a_layernorm: convert with --dtype bfloat16"
        )
