"""A GGUF file becomes the model that it holds, or is refused by what of it would be lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from tiny import tiny_model

import care_mla
from care_mla.errors import CheckpointError
from care_mla.modeling import gguf_to_directory
from care_mla.modeling.gguf import llama3_divisors

IDS = torch.randint(3, 259, (1, 40), generator=torch.Generator().manual_seed(1))
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
Change = Callable[[dict[str, Any], dict[str, np.ndarray]], None]


def _permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp orders them, whose RoPE turns neighbours."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def _write(file: Path, change: Change = lambda entries, tensors: None, **config: Any) -> torch.nn.Module:
    """A tiny Llama as llama.cpp writes it; entries and tensors may be changed before they are written."""
    model = tiny_model("llama", num_hidden_layers=2, **config)
    made = model.config
    entries: dict[str, Any] = {
        "block_count": made.num_hidden_layers,
        "context_length": made.max_position_embeddings,
        "embedding_length": made.hidden_size,
        "feed_forward_length": made.intermediate_size,
        "attention.head_count": made.num_attention_heads,
        "attention.head_count_kv": made.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": made.rms_norm_eps,
        "attention.key_length": made.head_dim,
        "attention.value_length": made.head_dim,
        "rope.dimension_count": made.head_dim,
        "rope.freq_base": made.rope_parameters["rope_theta"],
        "vocab_size": made.vocab_size,
    }
    tensors = {}
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            array = _permuted(array, made.num_attention_heads if "q_proj" in name else made.num_key_value_heads)
        whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
        inside = name.removesuffix(".weight")
        if inside not in whole:
            _, _, layer, part = inside.split(".", 3)
            whole[inside] = f"blk.{layer}.{NAMES[part]}"
        tensors[f"{whole[inside]}.weight"] = array
    change(entries, tensors)
    writer = GGUFWriter(file, "llama")
    for name, value in entries.items():
        key = name if name.startswith(("split.", "general.")) else f"llama.{name}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_string(key, value)
    symbols = ["<bos>", "<eos>", "a", "b", "ab", *(f"<{i}>" for i in range(5, made.vocab_size))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(symbols)
    writer.add_token_types([1] * len(symbols))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages[0].content }}")
    for name, array in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _entries(**changes: Any) -> Change:
    return lambda entries, tensors: entries.update({name.replace("__", "."): value for name, value in changes.items()})


def _rope(parameters: dict[str, Any]) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, **parameters}}


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7], "long_factor": [1.0, 2, 3, 4, 5, 6, 7, 8]}


def _llama3(entries: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    tensors["rope_freqs.weight"] = llama3_divisors(10000.0, 16, LLAMA3).float().numpy()


def _longrope(entries: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    entries["rope.scaling.original_context_length"] = 16
    for name in ("short", "long"):
        tensors[f"rope_factors_{name}.weight"] = np.array(FACTORS[f"{name}_factor"], dtype=np.float32)


@torch.no_grad()
@pytest.mark.parametrize(
    ("config", "change"),
    [
        ({}, _entries()),
        ({"tie_word_embeddings": True}, lambda entries, tensors: tensors.pop("output.weight")),
        (
            _rope({"rope_type": "linear", "factor": 4.0}),
            _entries(rope__scaling__type="linear", rope__scaling__factor=4.0),
        ),
        (_rope({"rope_type": "linear", "factor": 4.0}), _entries(rope__scale_linear=4.0)),
        (
            _rope({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}),
            _entries(
                rope__scaling__type="yarn",
                rope__scaling__factor=8.0,
                rope__scaling__original_context_length=32,
                rope__scaling__finetuned=True,
            ),
        ),
        (_rope(LLAMA3), _llama3),
        (_rope({"rope_type": "longrope", "original_max_position_embeddings": 16, **FACTORS}), _longrope),
    ],
    ids=["plain", "tied", "linear", "linear, as it was", "yarn", "llama3", "longrope"],
)
def test_the_directory_computes_what_the_file_means(config: dict[str, Any], change: Change, tmp_path: Path) -> None:
    original = _write(tmp_path / "m.gguf", change, **config)
    gguf_to_directory(tmp_path / "m.gguf", tmp_path / "out")
    torch.testing.assert_close(care_mla.load(tmp_path / "out")(IDS).logits, original(IDS).logits, atol=1e-4, rtol=0)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["max_position_embeddings"] == 256 and "quantization_config" not in written
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages[0].content }}"


def _lose(name: str) -> Change:
    return lambda entries, tensors: tensors.pop(name)


def _add(name: str, *shape: int) -> Change:
    return lambda entries, tensors: tensors.update({name: np.ones(shape, dtype=np.float32)})


def _other_llama3(entries: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    tensors["rope_freqs.weight"] = np.linspace(1, 8, 8, dtype=np.float32)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_lose("blk.1.attn_k.weight"), "no blk.1.attn_k.weight of the right shape (1 such)"),
        (_lose("output_norm.weight"), "no output_norm.weight"),
        (_add("blk.1.ffn_up.weight", 60, 48), "blk.1.ffn_up.weight"),
        (_add("blk.0.attn_q.bias", 64), "blk.0.attn_q.bias would be lost"),
        (_add("blk.5.attn_k.weight", 32, 48), "blk.5.attn_k.weight would be lost"),
        (_add("blk.0.attn_q_norm.weight", 16), "blk.0.attn_q_norm.weight would be lost"),
        (_add("blk.0.attn_k.scale", 1), "blk.0.attn_k.scale would be lost"),
        (_other_llama3, "rope_freqs.weight would be lost: its factors are not those of Llama 3"),
        (_add("rope_factors_long.weight", 8), "its counterpart is missing"),
        (
            _entries(rope__scaling__type="dynamic", rope__scaling__factor=2.0),
            "rope.scaling.type = dynamic would be lost",
        ),
        (
            _entries(rope__scaling__type="yarn", rope__scaling__factor=2.0, rope__scaling__attn_factor=0.5),
            "attn_factor",
        ),
        (_entries(rope__dimension_count=8, attention__key_length=16), "would be lost"),
        (_entries(attention__scale=0.5), "llama.attention.scale = 0.5 would be lost"),
        (_entries(attention__causal=False, attn_logit_softcapping=30.0), "attn_logit_softcapping = 30.0 would be lost"),
        (_entries(attention__sliding_window=8), "attention.sliding_window = 8 would be lost"),
        (_entries(logit_scale=0.25), "logit_scale = 0.25 would be lost"),
        (_entries(expert_count=4), "expert_count = 4 would be lost"),
        (_entries(split__count=3), "one of 3 parts; join them first: llama-gguf-split --merge"),
        (_entries(general__type="adapter"), "holds no model but a adapter"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_would_be_lost_is_refused_by_name(change: Change, says: str, tmp_path: Path) -> None:
    _write(tmp_path / "m.gguf", change)
    with pytest.raises(CheckpointError) as refused:
        gguf_to_directory(tmp_path / "m.gguf", tmp_path / "out")
    assert says in str(refused.value) and "\n" not in str(refused.value), refused.value
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: data[: len(data) // 2], "truncated or damaged"),
        (lambda data: data[:100], "truncated or damaged"),
        (lambda data: data[:4], "truncated or damaged"),
        (lambda data: b"", "not a GGUF file"),
        (lambda data: b"PK\3\4" + data[4:], "not a GGUF file"),
    ],
)
def test_files_that_are_not_whole(damage: Callable[[bytes], bytes], says: str, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    _write(file)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match=says):
        gguf_to_directory(file, tmp_path / "out")


def test_a_part_of_a_split_file_by_its_name(tmp_path: Path) -> None:
    _write(tmp_path / "m-00002-of-00003.gguf")
    with pytest.raises(CheckpointError, match="join them first"):
        gguf_to_directory(tmp_path / "m-00002-of-00003.gguf", tmp_path / "out")
