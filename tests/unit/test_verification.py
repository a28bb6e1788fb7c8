"""A wrong family spec is caught against transformers' own attention before anything is calibrated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import COMMON, TINY
from transformers import AutoConfig, AutoModelForCausalLM

from care_mla.checkpoint import CheckpointReader
from care_mla.errors import CheckpointError, UnsupportedModelError
from care_mla.families import FamilySpec, get_family, register_family
from care_mla.families.gemma2 import GEMMA2
from care_mla.families.gpt_oss import GPT_OSS
from care_mla.families.granite import GRANITE
from care_mla.families.llama import LLAMA
from care_mla.families.olmo2 import OLMO2
from care_mla.families.qwen2 import QWEN2
from care_mla.families.qwen3 import QWEN3
from care_mla.families.smollm3 import SMOLLM3
from care_mla.modeling import load
from care_mla.pipeline.source import open_source
from care_mla.pipeline.verification import require_runs, require_same_weights, require_true_spec

GPT_NEOX = FamilySpec(
    model_type="gpt_neox",
    layers="gpt_neox.layers",
    rotary="gpt_neox.rotary_emb",
    attention="attention",
    qkv_proj="query_key_value",
    q_proj="q_proj",
    o_proj="dense",
    qkv_bias=True,
)
HUNYUAN = FamilySpec(model_type="hunyuan_v1_dense", q_norm="query_layernorm", k_norm="key_layernorm")


@pytest.fixture
def registered() -> Iterator[Callable[[FamilySpec], None]]:
    """Register a spec for one test."""
    from care_mla import families

    before = dict(families._REGISTRY)
    yield register_family
    families._REGISTRY.clear()
    families._REGISTRY.update(before)


def _write(directory: Path, **entries: Any) -> Path:
    entries = {key: value for key, value in {**COMMON, **entries}.items() if value is not None}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**entries)).save_pretrained(directory)
    return directory


WRONG: dict[str, tuple[dict[str, Any], FamilySpec, str]] = {
    "fused rows interleaved by head": (
        {"model_type": "gpt_neox", "head_dim": None, "num_key_value_heads": None},
        GPT_NEOX,
        r"layer 0: with the family spec of gpt_neox the attention's output differs by .*%",
    ),
    "norm after RoPE": ({"model_type": "hunyuan_v1_dense"}, HUNYUAN, "layer 0: .* output differs by"),
    "k and v swapped": (TINY["llama"], replace(LLAMA, k_proj="v_proj", v_proj="k_proj"), "output differs by"),
    "QK-norm left out": (TINY["qwen3"], replace(QWEN3, q_norm=None, k_norm=None), "output differs by"),
    "QK-norm over each head": (TINY["olmo2"], replace(OLMO2, qk_norm_over="head"), "builds no attention that runs"),
    "interleaved where it is not": (TINY["llama"], replace(LLAMA, layers="model.blocks"), "names modules"),
    "window not passed on": (
        TINY["qwen2-window"],
        replace(QWEN2, attention_kwargs={}),
        "layer 1: .*passes sliding_window = None",
    ),
    "soft-cap not passed on": (
        TINY["gemma2"],
        replace(GEMMA2, attention_kwargs={"sliding_window": "sliding_window"}),
        "passes softcap = None",
    ),
    "sinks left out": (TINY["gpt_oss"], replace(GPT_OSS, sinks=False), "layer 0: .*(s_aux|differs|runs)"),
    "RoPE where there is none": (
        TINY["smollm3"],
        replace(SMOLLM3, use_rope=None, rope_layers=None),
        "layer 1: .*differs",
    ),
    "no such projection": (
        TINY["granite"],
        replace(GRANITE, v_proj="values"),
        "does not find the projections and norms",
    ),
    "no such norm": (TINY["qwen3"], replace(QWEN3, k_norm="key_norm"), "does not find .*key_norm"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_spec(fault: str, tmp_path: Path, registered: Callable[[FamilySpec], None]) -> None:
    entries, spec, message = WRONG[fault]
    directory = _write(tmp_path / "model", **entries)
    registered(spec)
    with pytest.raises(UnsupportedModelError, match=message) as refused:
        require_true_spec(open_source(directory))
    assert "\n" not in str(refused.value)


def test_convert_and_calibrate_ask_before_they_calibrate(
    tmp_path: Path, care: Callable[..., str], text_file: Path, registered: Callable[[FamilySpec], None]
) -> None:
    directory = _write(tmp_path / "model", **TINY["llama"])
    registered(replace(LLAMA, k_proj="v_proj", v_proj="k_proj"))
    for command in (["calibrate"], ["convert", "--kv-save", "0.5"]):
        said = care(*command, directory, "--out", tmp_path / "out", "--calibration", text_file, code=1)
        assert "differs by" in said and "tokenizer" not in said


def test_every_family_is_as_transformers_has_it(tiny: Callable[..., Path], family: str) -> None:
    require_true_spec(open_source(tiny(family)))


def test_loaded_weights_are_those_that_are_converted(tiny: Callable[..., Path]) -> None:
    source = open_source(tiny("phi3"))
    model = load(source.directory)
    require_same_weights(source, model)
    module = model.get_submodule("model.layers.1.self_attn.qkv_proj")
    with torch.no_grad():
        module.weight[-1, 0] += 1  # a value row
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.qkv_proj\.weight .* stored for v"):
        require_same_weights(source, model)


def test_damaged_numbers_are_named_as_loaded(tiny: Callable[..., Path]) -> None:
    source = open_source(tiny())
    model = load(source.directory)
    with torch.no_grad():
        model.get_submodule("model.layers.2.mlp.up_proj").weight[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.up_proj\.weight holds NaN"):
        require_same_weights(source, model)


def test_a_spec_says_nothing_of_weights(tiny: Callable[..., Path]) -> None:
    """The check needs config.json alone: 70 billion weights are not read twice."""
    directory = tiny()
    source = open_source(directory)
    (directory / "model.safetensors").unlink()
    require_true_spec(source)
    assert get_family(source.reader.config) is LLAMA and isinstance(source.reader, CheckpointReader)


def test_a_precision_that_transformers_cannot_run(tiny: Callable[..., Path]) -> None:
    source = open_source(tiny("mixtral"))
    model = load(source.directory)
    require_runs(source, model)
    model.double()
    model.lm_head = torch.nn.Linear(7, 7)
    with pytest.raises(CheckpointError, match="does not run in float64 on cpu: .*dtype in config.json"):
        require_runs(source, model)
