"""Whatever a checkpoint is: it is refused in one sentence, or converts at full rank to the logits that transformers computes from it.

`CARE_PROPERTY_CASES=300 pytest -n0 tests/property` tries more of the seeds.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import TINY, byte_tokenizer, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

import care_mla
from care_mla.errors import ConversionError

pytestmark = pytest.mark.usefixtures("no_figures")

CASES = int(os.environ.get("CARE_PROPERTY_CASES", 24))
SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 40, "head_dim": 8}
BASES = (
    "llama",
    "llama-scaled-rope",
    "llama-mqa-bias",
    "qwen2",
    "qwen3",
    "gemma3",
    "phi3",
    "mixtral",
    "olmo2",
    "starcoder2",
)


@dataclass
class Draft:
    """A checkpoint before it is written.

    Attributes:
        shards: number of files of the weights; 1 is model.safetensors.
        steps: what is done to the directory after it is written.
        prefixed: whether names begin as transformers writes them.
    """

    name: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    shards: int
    steps: list[Callable[[Path], object]] = field(default_factory=list)

    def some(self, rng: random.Random, *words: str) -> str:
        """Name of a tensor with one of these words in it; any tensor where there is none."""
        fitting = [name for name in sorted(self.tensors) if any(word in name for word in words)]
        return rng.choice(fitting or sorted(self.tensors))


ATTENTION = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj")
KEYS_VALUES = ("k_proj", "v_proj", "qkv_proj")
ANY = ("",)
FAULTS: dict[str, Callable[[Draft, random.Random], object]] = {}


def _fault(function: Callable[[Draft, random.Random], object]) -> Callable[[Draft, random.Random], object]:
    FAULTS[function.__name__.strip("_")] = function
    return function


# Tensors.


@_fault
def _tensor_missing(draft: Draft, rng: random.Random) -> None:
    del draft.tensors[draft.some(rng, *rng.choice([ATTENTION, ANY]))]


@_fault
def _head_missing(draft: Draft, rng: random.Random) -> None:
    draft.tensors.pop("lm_head.weight", None)


@_fault
def _bias_without_entry(draft: Draft, rng: random.Random) -> None:
    for name in rng.choice([("k_proj", "v_proj"), ("q_proj",), ("o_proj",), ("q_proj", "k_proj", "v_proj", "o_proj")]):
        for weight in [each for each in draft.tensors if each.endswith(f"{name}.weight")]:
            draft.tensors[weight.replace(".weight", ".bias")] = torch.randn(len(draft.tensors[weight]))


@_fault
def _norm_without_entry(draft: Draft, rng: random.Random) -> None:
    draft.tensors["model.layers.0.self_attn.k_norm.weight"] = torch.rand(8)


@_fault
def _layer_too_many(draft: Draft, rng: random.Random) -> None:
    for name in [each for each in draft.tensors if ".layers.1." in each]:
        draft.tensors[name.replace(".layers.1.", ".layers.2.")] = draft.tensors[name].clone()


@_fault
def _foreign_tensor(draft: Draft, rng: random.Random) -> None:
    draft.tensors[rng.choice(["value_head.weight", "model.extra", "mtp.layers.0.self_attn.k_proj.weight"])] = (
        torch.randn(3, 3)
    )


@_fault
def _old_buffers(draft: Draft, rng: random.Random) -> None:
    for layer in range(2):
        draft.tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.rand(4)


@_fault
def _without_prefix(draft: Draft, rng: random.Random) -> None:
    draft.tensors = {name.removeprefix("model."): tensor for name, tensor in draft.tensors.items()}


@_fault
def _base_model_alone(draft: Draft, rng: random.Random) -> None:
    """As AutoModel.save_pretrained writes it."""
    _without_prefix(draft, rng)
    draft.tensors.pop("lm_head.weight", None)
    draft.config["tie_word_embeddings"] = True


@_fault
def _prefix_on_everything(draft: Draft, rng: random.Random) -> None:
    draft.tensors = {f"model.{name}": tensor for name, tensor in draft.tensors.items()}


@_fault
def _head_with_prefix(draft: Draft, rng: random.Random) -> None:
    if "lm_head.weight" in draft.tensors:
        draft.tensors["model.lm_head.weight"] = draft.tensors.pop("lm_head.weight")


@_fault
def _other_prefix(draft: Draft, rng: random.Random) -> None:
    prefix = rng.choice(
        ["transformer.", "module.model.", "_orig_mod.model.", "base_model.model.model.", "language_model.model."]
    )
    draft.tensors = {name.replace("model.", prefix, 1): tensor for name, tensor in draft.tensors.items()}


@_fault
def _one_renamed(draft: Draft, rng: random.Random) -> None:
    name = draft.some(rng, *rng.choice([ATTENTION, ANY]))
    other = rng.choice([name.removeprefix("model."), name.replace("proj", "projection"), name.upper(), f"{name}.0"])
    draft.tensors[other] = draft.tensors.pop(name)


@_fault
def _two_names_for_one(draft: Draft, rng: random.Random) -> None:
    name = draft.some(rng, *ATTENTION)
    draft.tensors[name.removeprefix("model.")] = torch.randn_like(draft.tensors[name])


@_fault
def _swapped(draft: Draft, rng: random.Random) -> None:
    """Nothing to notice: these are the model's weights."""
    keys = [name for name in draft.tensors if "k_proj.weight" in name]
    for name in keys:
        other = name.replace("k_proj", "v_proj")
        draft.tensors[name], draft.tensors[other] = draft.tensors[other], draft.tensors[name]


@_fault
def _one_retyped(draft: Draft, rng: random.Random) -> None:
    name = draft.some(rng, *rng.choice([ATTENTION, ANY]))
    types = [
        torch.bfloat16,
        torch.float16,
        torch.float64,
        torch.int8,
        torch.uint8,
        torch.bool,
        torch.int64,
        torch.complex64,
        torch.float8_e4m3fn,
    ]
    draft.tensors[name] = draft.tensors[name].to(rng.choice(types))


@_fault
def _all_retyped(draft: Draft, rng: random.Random) -> None:
    """config.json says as before."""
    kind = rng.choice([torch.bfloat16, torch.float16, torch.float64])
    draft.tensors = {name: tensor.to(kind) for name, tensor in draft.tensors.items()}


@_fault
def _all_retyped_and_said(draft: Draft, rng: random.Random) -> None:
    kind = rng.choice(["bfloat16", "float16", "float64"])
    draft.tensors = {name: tensor.to(getattr(torch, kind)) for name, tensor in draft.tensors.items()}
    draft.config.pop("dtype", None)
    if rng.random() < 0.7:
        draft.config[rng.choice(["dtype", "torch_dtype"])] = kind


@_fault
def _float8_with_scales(draft: Draft, rng: random.Random) -> None:
    suffix = rng.choice(["_scale", "_scale_inv", "_scale_2", ".absmax"])
    for name in [each for each in draft.tensors if each.endswith("proj.weight")]:
        scale = draft.tensors[name].abs().max() / 448
        draft.tensors[name] = (draft.tensors[name] / scale).to(torch.float8_e4m3fn)
        draft.tensors[name + suffix] = scale.reshape(1)


@_fault
def _scales_beside(draft: Draft, rng: random.Random) -> None:
    attention = draft.some(rng, *ATTENTION).removesuffix(".weight")
    part = rng.choice(
        ["input_scale", "weight_scale_inv", "k_scale", "weight_zero_point", "scales", "qzeros", "g_idx", "SCB"]
    )
    draft.tensors[f"{attention}.{part}"] = torch.rand(4)


@_fault
def _packed(draft: Draft, rng: random.Random) -> None:
    name = draft.some(rng, *ATTENTION)
    packed = rng.choice(["qweight", "weight_packed"])
    draft.tensors[name.replace(".weight", f".{packed}").replace(".bias", f".{packed}")] = torch.randint(
        0, 9, (4, 4), dtype=torch.int32
    )
    if rng.random() < 0.5:
        draft.tensors.pop(name)


@_fault
def _reshaped(draft: Draft, rng: random.Random) -> None:
    name = draft.some(rng, *rng.choice([ATTENTION, ANY]))
    tensor = draft.tensors[name]
    draft.tensors[name] = rng.choice(
        [
            tensor[:-1],
            torch.cat([tensor, tensor]),
            tensor.T.contiguous() if tensor.ndim == 2 else tensor[:1],
            tensor[None],
        ]
    ).clone()


@_fault
def _not_a_number(draft: Draft, rng: random.Random) -> None:
    name = draft.some(rng, *rng.choice([KEYS_VALUES, ATTENTION, ANY]))
    tensor = draft.tensors[name].clone()
    tensor.view(-1)[rng.randrange(tensor.numel())] = (
        rng.choice([float("nan"), float("inf"), -float("inf")]) if tensor.is_floating_point() else 1
    )
    draft.tensors[name] = tensor


@_fault
def _zeros(draft: Draft, rng: random.Random) -> None:
    words = rng.choice(
        [("k_proj",), ("v_proj",), KEYS_VALUES, ATTENTION, ("q_proj",), ("norm",), ("embed_tokens",), ANY]
    )
    for name in draft.tensors:
        if any(word in name for word in words):
            draft.tensors[name] = torch.zeros_like(draft.tensors[name])


@_fault
def _low_rank_already(draft: Draft, rng: random.Random) -> None:
    for name in draft.tensors:
        if name.endswith(tuple(f"{word}.weight" for word in KEYS_VALUES)):
            draft.tensors[name] = draft.tensors[name][:, :1] @ draft.tensors[name][:1]


# Files.


def _weights_of(draft: Draft, rng: random.Random, share: float) -> dict[str, Tensor]:
    return {name: torch.randn(tensor.shape) for name, tensor in draft.tensors.items() if rng.random() < share}


@_fault
def _stray_whole_file(draft: Draft, rng: random.Random) -> None:
    draft.shards = 2
    other = _weights_of(draft, rng, rng.choice([1.0, 1.0, 0.5]))
    draft.steps.append(lambda directory: save_file(other, directory / "model.safetensors", {"format": "pt"}))


@_fault
def _stale_index(draft: Draft, rng: random.Random) -> None:
    draft.shards = 1
    index = {"metadata": {}, "weight_map": dict.fromkeys(draft.tensors, "model-00001-of-00001.safetensors")}
    draft.steps.append(lambda directory: (directory / "model.safetensors.index.json").write_text(json.dumps(index)))


@_fault
def _stray_shard(draft: Draft, rng: random.Random) -> None:
    other = _weights_of(draft, rng, 0.5) or {"x": torch.zeros(1)}
    name = rng.choice(
        [
            "model-00003-of-00003.safetensors",
            "consolidated.safetensors",
            "model.fp16.safetensors",
            "adapter.safetensors",
        ]
    )
    draft.steps.append(lambda directory: save_file(other, directory / name, {"format": "pt"}))


@_fault
def _beyond_the_index(draft: Draft, rng: random.Random) -> None:
    draft.shards = 2
    forgotten = [draft.some(rng, *ATTENTION), draft.some(rng, "")]
    draft.steps.append(
        lambda directory: _edit_index(directory, lambda index: [index["weight_map"].pop(n, None) for n in forgotten])
    )


@_fault
def _damaged_index(draft: Draft, rng: random.Random) -> None:
    draft.shards = 2
    edits: list[Callable[[dict[str, Any]], object]] = [
        lambda index: index.pop("metadata"),
        lambda index: index.pop("weight_map"),
        lambda index: index["weight_map"].update(ghost="model-00001-of-00002.safetensors"),
        lambda index: index["weight_map"].update(ghost="model-00009-of-00009.safetensors"),
        lambda index: index["weight_map"].update(ghost="pytorch_model.bin"),
        lambda index: index.update(weight_map=[]),
    ]
    edit = rng.choice(edits)
    draft.steps.append(lambda directory: _edit_index(directory, edit))


def _edit_index(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text()) if path.is_file() else {"metadata": {}, "weight_map": {}}
    edit(index)
    path.write_text(json.dumps(index))


@_fault
def _doubled(draft: Draft, rng: random.Random) -> None:
    draft.shards = 2
    name, first = draft.some(rng, *ATTENTION), rng.random() < 0.5
    other = torch.randn(draft.tensors[name].shape)

    def repeat(directory: Path) -> None:
        shard = directory / f"model-0000{1 if first else 2}-of-00002.safetensors"
        from safetensors.torch import load_file

        save_file({**load_file(shard), name: other}, shard, {"format": "pt"})

    draft.steps.append(repeat)


@_fault
def _other_file_named(draft: Draft, rng: random.Random) -> None:
    draft.config["transformers_weights"] = rng.choice(
        ["other.safetensors", "../other.safetensors", "absent.safetensors", "model.bin"]
    )
    other = {name: torch.randn(tensor.shape) for name, tensor in draft.tensors.items()}
    draft.steps.append(lambda directory: save_file(other, directory / "other.safetensors", {"format": "pt"}))


@_fault
def _truncated(draft: Draft, rng: random.Random) -> None:
    def cut(directory: Path) -> None:
        shard = rng.choice(sorted(directory.glob("model*.safetensors")))
        shard.write_bytes(shard.read_bytes()[: -rng.choice([1, 100])])

    draft.steps.append(cut)


@_fault
def _pickled_alone(draft: Draft, rng: random.Random) -> None:
    def rename(directory: Path) -> None:
        for shard in directory.glob("*.safetensors"):
            shard.rename(directory / "pytorch_model.bin")

    draft.steps.append(rename)


@_fault
def _quantization_file(draft: Draft, rng: random.Random) -> None:
    name = rng.choice(["quantize_config.json", "quant_config.json", "hf_quant_config.json"])
    draft.steps.append(lambda directory: (directory / name).write_text('{"bits": 4}'))


@_fault
def _adapter(draft: Draft, rng: random.Random) -> None:
    draft.steps.append(
        lambda directory: (directory / "adapter_config.json").write_text(
            '{"peft_type": "LORA", "base_model_name_or_path": "x"}'
        )
    )


@_fault
def _rank_local(draft: Draft, rng: random.Random) -> None:
    other = _weights_of(draft, rng, 1.0)
    draft.steps.append(
        lambda directory: save_file(other, directory / "shard-00000-model-00001-of-00001.safetensors", {"format": "pt"})
    )


# config.json.


@_fault
def _tied_in_words(draft: Draft, rng: random.Random) -> None:
    draft.config["tie_word_embeddings"] = rng.choice([True, False])


@_fault
def _other_number(draft: Draft, rng: random.Random) -> None:
    key = rng.choice(
        [
            "num_hidden_layers",
            "num_key_value_heads",
            "num_attention_heads",
            "head_dim",
            "hidden_size",
            "vocab_size",
            "intermediate_size",
        ]
    )
    value = draft.config.get(key)
    draft.config[key] = rng.choice([1, 2, 3, 4, 5, 8, 16, value, None])


@_fault
def _other_setting(draft: Draft, rng: random.Random) -> None:
    settings = {
        "attention_bias": [True, False],
        "hidden_act": ["gelu", "silu"],
        "rms_norm_eps": [1e-3, 0.1],
        "sliding_window": [4, None],
        "use_sliding_window": [True, False],
        "attention_dropout": [0.5],
        "use_cache": [False],
        "pretraining_tp": [2],
        "initializer_range": [1.0],
        "attn_implementation": ["eager"],
        "_attn_implementation": ["eager"],
        "output_attentions": [True],
        "is_decoder": [True],
    }
    key = rng.choice(sorted(settings))
    draft.config[key] = rng.choice(settings[key])


@_fault
def _rope_twice(draft: Draft, rng: random.Random) -> None:
    kinds = [
        {"type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"type": "dynamic", "rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "default", "rope_theta": 50.0},
        {"rope_type": "default", "partial_rotary_factor": 0.5},
    ]
    if rng.random() < 0.5 and "rope_parameters" in draft.config:
        draft.config["rope_parameters"] = {"rope_type": "default", "rope_theta": 100.0}
    else:
        draft.config.pop("rope_parameters", None)
    draft.config["rope_scaling"] = rng.choice(kinds)
    draft.config["rope_theta"] = rng.choice([100.0, 5000.0])


@_fault
def _said_to_be_quantized(draft: Draft, rng: random.Random) -> None:
    entry = {"quant_method": rng.choice(["fp8", "gptq", "compressed-tensors"])}
    where = rng.choice(["quantization_config", "compression_config"])
    draft.config.update(rng.choice([{where: entry}, {"text_config": {where: entry}}]))


@_fault
def _code_of_others(draft: Draft, rng: random.Random) -> None:
    draft.config["auto_map"] = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}


@_fault
def _other_architecture(draft: Draft, rng: random.Random) -> None:
    draft.config["architectures"] = rng.choice([["GPT2LMHeadModel"], ["MistralForSequenceClassification"], [], None])


@_fault
def _other_family(draft: Draft, rng: random.Random) -> None:
    draft.config["model_type"] = rng.choice(
        ["llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "olmo2", "gemma2"]
    )


@_fault
def _other_dtype(draft: Draft, rng: random.Random) -> None:
    draft.config.pop("dtype", None)
    draft.config[rng.choice(["dtype", "torch_dtype"])] = rng.choice(
        ["bfloat16", "float16", "float64", "float32", "int8", "auto", None]
    )


def draft_of(seed: int) -> tuple[Draft, list[str]]:
    """A checkpoint with no, one or two faults, and their names."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    base = rng.choice(BASES)
    small = {key: value for key, value in SMALL.items() if TINY[base].get(key, 0) is not None}
    model = tiny_model(base, seed=seed, **small)
    directory = {"config": json.loads(model.config.to_json_string())}
    tensors = {name: tensor.clone() for name, tensor in _stored(model).items()}
    draft = Draft(base, directory["config"], tensors, rng.choice([1, 1, 2, 3]))
    faults = rng.sample(sorted(FAULTS), rng.choice([0, 1, 1, 1, 2, 2]))
    for fault in faults:
        FAULTS[fault](draft, rng)
    return draft, faults


def _stored(model: Any) -> dict[str, Tensor]:
    """As save_pretrained stores it: shared weights once, experts one by one."""
    from transformers.core_model_loading import revert_weight_conversion

    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight")
    return revert_weight_conversion(model, tensors)


def write(draft: Draft, directory: Path) -> Path:
    """The checkpoint on disk."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(draft.config))
    byte_tokenizer().save_pretrained(directory)
    names, count = list(draft.tensors), draft.shards
    tensors = {name: tensor.contiguous().clone() for name, tensor in draft.tensors.items()}
    if count == 1:
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    else:
        weight_map = {}
        for number in range(count):
            part = names[number::count]
            shard = f"model-0000{number + 1}-of-0000{count}.safetensors"
            save_file({name: tensors[name] for name in part}, directory / shard, {"format": "pt"})
            weight_map.update(dict.fromkeys(part, shard))
        (directory / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
        )
    for step in draft.steps:
        step(directory)
    return directory


IDS = torch.randint(3, 259, (2, 20), generator=torch.Generator().manual_seed(7))


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits.double()


def try_case(seed: int, place: Path, text_file: Path) -> str:
    """Convert the checkpoint of a seed and compare; returns what was done, and raises AssertionError where that is wrong."""
    draft, faults = draft_of(seed)
    source = write(draft, place / "source")
    rng = random.Random(-seed)
    heads = draft.config.get("num_key_value_heads") or draft.config.get("num_attention_heads") or 4
    width = draft.config.get("head_dim") or (draft.config.get("hidden_size") or 32) // (
        draft.config.get("num_attention_heads") or 4
    )
    recipe = {
        "method": rng.choice(["svd", "care"]),
        "layout": rng.choice(["joint", "split"]),
        "ranks": "uniform",
        "rank": heads * width,
    }
    precision = rng.choice(["auto", "float32"])
    case = f"seed {seed}: {draft.name} in {draft.shards} with {faults}, {recipe}, {precision}"
    calibration = {"calibration": str(text_file), "samples": 2, "seqlen": 16, "batch_size": 2}
    try:
        care_mla.convert(source, place / "out", calibration=calibration, dtype=precision, **recipe)
    except ConversionError as refused:
        assert str(refused).strip() and "\n" not in str(refused), f"{case}: {refused!r}"
        assert not (place / "out").exists(), case
        return f"refused: {refused}"
    own = AutoModelForCausalLM.from_pretrained(source, dtype=precision, use_safetensors=True)
    ours = care_mla.load(place / "out", dtype=precision)
    assert own.dtype == ours.dtype, f"{case}: {ours.dtype} of {own.dtype}"
    expected, found = _logits(own), _logits(ours)
    tolerance = 1e-3 if own.dtype in (torch.float32, torch.float64) else 0.1
    error = (found - expected).norm() / expected.norm().clamp(min=1e-9)
    assert torch.equal(found.isnan(), expected.isnan()), case
    assert expected.isnan().any() or error <= tolerance, f"{case}: logits differ by {error:.2e}"
    return "converted"


@pytest.mark.parametrize("seed", range(CASES))
def test_refused_or_the_same(seed: int, tmp_path: Path, text_file: Path) -> None:
    try_case(seed, tmp_path, text_file)
