"""Checkpoints that would become another model than the one transformers computes, or that cannot be read."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from refusals import CALIBRATE, CONVERT, Place, Refusal

QUANTIZED, STORED, BESIDE = "Quantized weights", "Weights", "Files beside the weights"
K_PROJ = "model.layers.1.self_attn.k_proj.weight"


def _weights(edit: Callable[[dict[str, Tensor]], object]) -> Callable[[Place], None]:
    """Change the tensors of the source."""

    def prepare(place: Place) -> None:
        path = place.source / "model.safetensors"
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path, {"format": "pt"})

    return prepare


def _config(**entries: Any) -> Callable[[Place], None]:
    """Change entries of config.json."""

    def prepare(place: Place) -> None:
        path = place.source / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))

    return prepare


def _file(name: str, content: str = "{}") -> Callable[[Place], object]:
    return lambda place: (place.source / name).write_text(content)


def _float8(tensors: dict[str, Tensor]) -> None:
    for name in [each for each in tensors if each.endswith("proj.weight")]:
        scale = tensors[name].abs().max() / 448
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale"] = scale.reshape(1)


def _stored_as(dtype: torch.dtype) -> Callable[[Place], None]:
    return _weights(lambda tensors: tensors.update({K_PROJ: tensors[K_PROJ].to(dtype)}))


def _without(name: str) -> Callable[[Place], None]:
    return _weights(lambda tensors: tensors.pop(name))


def _base_model_alone(tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)
    tensors.pop("lm_head.weight")


def _sharded(edit: Callable[[dict[str, Any], Place], object]) -> Callable[[Place], None]:
    """The source in two shards with an index that is then changed."""

    def prepare(place: Place) -> None:
        path = place.source / "model.safetensors"
        tensors = load_file(path)
        path.unlink()
        index: dict[str, Any] = {"metadata": {"total_size": 1}, "weight_map": {}}
        for number in (1, 2):
            shard = f"model-0000{number}-of-00002.safetensors"
            part = {name: tensors[name] for name in sorted(tensors)[number - 1 :: 2]}
            save_file(part, place.source / shard, {"format": "pt"})
            index["weight_map"].update(dict.fromkeys(part, shard))
        edit(index, place)
        (place.source / "model.safetensors.index.json").write_text(json.dumps(index))

    return prepare


def _twice(index: dict[str, Any], place: Place) -> None:
    shards = [place.source / f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    first, second = (load_file(shard) for shard in shards)
    name = next(iter(first))
    save_file({**second, name: first[name]}, shards[1], {"format": "pt"})


CASES = [
    Refusal(
        QUANTIZED,
        "float8 projections with scales, config.json silent",
        CONVERT,
        "is stored as F8_E4M3",
        _weights(_float8),
    ),
    *(
        Refusal(
            QUANTIZED, f"a projection stored as {dtype}", CALIBRATE, f"{K_PROJ} is stored as {name}", _stored_as(dtype)
        )
        for dtype, name in [
            (torch.int8, "I8"),
            (torch.uint8, "U8"),
            (torch.bool, "BOOL"),
            (torch.int64, "I64"),
            (torch.complex64, "C64"),
        ]
    ),
    *(
        Refusal(
            QUANTIZED,
            f"a tensor .{part} beside the projections",
            CONVERT,
            f"self_attn.k_proj.{part} (F32) is no weight of this architecture but tells how quantized ones are stored",
            _weights(lambda t, part=part: t.update({f"model.layers.0.self_attn.k_proj.{part}": torch.ones(1)})),  # type: ignore[misc]
        )
        for part in ("input_scale", "weight_scale_inv", "weight_zero_point", "k_scale", "qweight", "scales", "SCB")
    ),
    *(
        Refusal(
            QUANTIZED, f"the file {name}", CONVERT, f"SOURCE/{name} says that the weights are quantized", _file(name)
        )
        for name in ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
    ),
    Refusal(
        QUANTIZED,
        "compression_config in config.json",
        CONVERT,
        "says in compression_config",
        _config(compression_config={"quant_method": "compressed-tensors"}),
    ),
    Refusal(
        QUANTIZED,
        "quantization_config of a part of the model",
        CONVERT,
        "says in text_config.quantization_config",
        _config(text_config={"quantization_config": {"quant_method": "fp8"}}),
    ),
    Refusal(BESIDE, "an adapter", CONVERT, "call merge_and_unload", _file("adapter_config.json")),
    Refusal(BESIDE, "an adapter, to calibrate", CALIBRATE, "call merge_and_unload", _file("adapter_config.json")),
    Refusal(
        BESIDE,
        "an adapter alone",
        ("inspect", "SOURCE"),
        "call merge_and_unload",
        lambda place: (
            (place.source / "adapter_config.json").write_text("{}"),
            (place.source / "config.json").unlink(),
        ),
    ),
    Refusal(
        BESIDE,
        "shards of a distributed run",
        CONVERT,
        "a shard of a distributed run",
        lambda place: save_file({"x": torch.ones(1)}, place.source / "shard-00000-model-00001-of-00001.safetensors"),
    ),
    Refusal(STORED, "a missing projection", CONVERT, f"SOURCE has no {K_PROJ}", _without(K_PROJ)),
    Refusal(
        STORED, "a model without its head", CALIBRATE, "must say so (tie_word_embeddings)", _weights(_base_model_alone)
    ),
    Refusal(
        STORED,
        "a bias that config.json does not ask for",
        CALIBRATE,
        "is stored, but the attention that config.json describes has no such weight",
        _weights(lambda t: t.update({"model.layers.0.self_attn.k_proj.bias": torch.ones(32)})),
    ),
    Refusal(
        STORED,
        "biases that config.json asks for and nobody stored",
        CALIBRATE,
        "self_attn.k_proj.bias, which this llama model needs",
        _config(attention_bias=True),
    ),
    Refusal(
        STORED,
        "a projection of another shape",
        CALIBRATE,
        "config.json asks for (64, 48)",
        _config(num_key_value_heads=4),
    ),
    Refusal(
        STORED, "fewer layers than config.json says", CALIBRATE, "has no model.layers.3.", _config(num_hidden_layers=4)
    ),
    Refusal(
        STORED,
        "a weight under two names",
        CONVERT,
        "are both stored and stand for one weight",
        _weights(lambda t: t.update({K_PROJ.removeprefix("model."): t[K_PROJ] + 1})),
    ),
    Refusal(STORED, "a weight in two shards", CONVERT, "is stored twice", _sharded(_twice)),
    Refusal(
        STORED,
        "an index without metadata",
        CONVERT,
        'has no "metadata"',
        _sharded(lambda index, _: index.pop("metadata")),
    ),
    Refusal(
        STORED,
        "an index without weights",
        CONVERT,
        'has no "weight_map"',
        _sharded(lambda index, _: index.pop("weight_map")),
    ),
    Refusal(
        STORED,
        "an index of pickled files",
        CONVERT,
        "which is no safetensors file",
        _sharded(lambda index, _: index["weight_map"].update(x="pytorch_model.bin")),
    ),
    Refusal(
        STORED,
        "weights outside the directory",
        CONVERT,
        "no safetensors file inside the directory",
        _config(transformers_weights="../model.safetensors"),
    ),
    Refusal(
        STORED,
        "NaN in a projection",
        CALIBRATE,
        f"{K_PROJ} holds NaN or infinite numbers",
        _weights(lambda t: t[K_PROJ].__setitem__((0, 0), float("nan"))),
    ),
    Refusal(
        STORED,
        "infinite numbers outside the attention",
        CALIBRATE,
        "mlp.up_proj.weight holds NaN or infinite numbers",
        _weights(lambda t: t["model.layers.0.mlp.up_proj.weight"].__setitem__((0, 0), float("inf"))),
    ),
]
