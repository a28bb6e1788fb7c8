"""The registry, what a spec says of a config.json, and the page made from the specs."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import COMMON, TINY

import care_mla
from care_mla import families
from care_mla.errors import UnsupportedModelError
from care_mla.families import FamilySpec, get_family
from care_mla.families import gemma2 as gemma2_module
from care_mla.families.gemma3 import GEMMA3
from care_mla.families.llama import LLAMA

DOCS = Path(__file__).parents[2] / "docs"
IDS = torch.randint(3, 259, (2, 20), generator=torch.Generator().manual_seed(1))


def _documented() -> FamilySpec:
    """The example of docs/families.md, as printed there."""
    code = re.search(r"```python\n(.*?)```", (DOCS / "families.md").read_text(), re.DOTALL)
    assert code is not None
    assert len(code[1].strip().splitlines()) <= 10
    names: dict[str, Any] = {}
    exec(code[1], names)
    spec: FamilySpec = names["COHERE"]
    return spec


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, FamilySpec]:
    copy = dict(families._REGISTRY)
    monkeypatch.setattr(families, "_REGISTRY", copy)
    return copy


@torch.no_grad()
def test_the_documented_registration_converts(
    registry: dict[str, FamilySpec],
    tiny: Callable[..., Path],
    tmp_path: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _documented()
    assert "cohere" in registry
    monkeypatch.setitem(TINY, "cohere", {"model_type": "cohere", "head_dim": None, "logit_scale": 1.0})
    source = tiny("cohere")
    options = {"calibration": {"calibration": str(text_file), "samples": 16, "seqlen": 48}}
    care_mla.convert(source, tmp_path / "out", rank=24, **options)
    original, converted = care_mla.load(source), care_mla.load(tmp_path / "out")
    torch.testing.assert_close(converted(IDS).logits, original(IDS).logits, atol=1e-4, rtol=0)
    greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    assert torch.equal(converted.generate(IDS, **greedy), original.generate(IDS, **greedy))
    with pytest.raises(UnsupportedModelError, match="interleaved RoPE.*choose --layout split or joint"):
        care_mla.convert(source, tmp_path / "mla", kv_save=0.5, layout="mla", **options)


def test_installed_packages_bring_families(registry: dict[str, FamilySpec], monkeypatch: pytest.MonkeyPatch) -> None:
    spec = FamilySpec(model_type="theirs")
    entry = SimpleNamespace(load=lambda: spec)
    monkeypatch.setattr(families, "entry_points", lambda group: [entry] if group == "care_mla.families" else [])
    assert get_family({"model_type": "theirs"}) is spec


def test_unknown_model_types_are_refused_with_the_known_ones() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'gpt_neox'.*known: gemma2, .*starcoder2.*docs/families.md"):
        get_family({"model_type": "gpt_neox"})


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}, "mxfp4.*dequantized"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "causal"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "causal"),
    ],
)
def test_what_no_layout_can_express_is_refused(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        get_family(config)


@pytest.mark.parametrize(
    ("config", "feature", "how"),
    [
        ({"model_type": "mistral"}, "sliding window", "4096 tokens"),  # omitted is the class's default
        ({"model_type": "mistral", "sliding_window": None}, "sliding window", None),  # null is none
        ({"model_type": "gemma2", "num_hidden_layers": 5}, "sliding window", "4096 tokens in 3 of 5 layers"),
        ({"model_type": "gemma3_text", "num_hidden_layers": 26}, "sliding window", "4096 tokens in 22 of 26 layers"),
        ({"model_type": "gemma3_text", "rope_scaling": {"rope_type": "linear"}}, "RoPE scaling", "linear"),
        ({"model_type": "phi3", "rope_scaling": {"type": "longrope"}}, "length-dependent RoPE", "longrope"),
        ({"model_type": "phi3", "partial_rotary_factor": 0.75}, "partial RoPE", "75% of every head"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 1, 1, 0]}, "layers without RoPE", "1 of 4"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 1]}, "layers without RoPE", None),
        ({"model_type": "starcoder2"}, "qkv bias", "q, k, v"),
        ({"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 4096}, "sliding window", None),
    ],
)
def test_features_are_read_from_config_json(config: dict[str, Any], feature: str, how: str | None) -> None:
    assert get_family(config).features(config).get(feature) == how


def test_specs_are_data() -> None:
    for path in Path(gemma2_module.__file__).parent.glob("*.py"):
        if path.name not in ("__init__.py", "spec.py", "entries.py", "ordinary.py", "refusals.py"):
            text = path.read_text()
            assert "def " not in text and "lambda" not in text, path


def test_the_page_is_up_to_date() -> None:
    made = runpy.run_path(str(DOCS / "make_families.py"))["render"]()
    assert made == (DOCS / "families.md").read_text(), "run python docs/make_families.py"


def test_config_json_of_tiny_models_and_their_classes_agree(tiny: Callable[..., Path]) -> None:
    """What a spec reads from a sparse config.json equals what it reads from one with every default written out."""
    from transformers import AutoConfig

    for name, entries in TINY.items():
        whole = json.loads((tiny(name) / "config.json").read_text())
        bare = {"num_hidden_layers": 26, **{k: v for k, v in entries.items() if k == "model_type"}}
        complete = AutoConfig.for_model(**bare).to_dict()
        spec = get_family(whole)
        needed = {key: complete[key] for key in ("hidden_size", "num_attention_heads", "num_hidden_layers")}
        assert spec.geometry({**bare, **needed}) == spec.geometry(complete), name


@torch.no_grad()
def test_fused_projections_convert_as_separate_ones_do(
    tiny: Callable[..., Path], tmp_path: Path, text_file: Path
) -> None:
    """Phi-3 is Llama with q, k, v and the two halves of the MLP stacked: same statistics, same latents, same refit."""
    fused = tiny("phi3", sliding_window=None)
    separate = tiny("llama", head_dim=12, rms_norm_eps=1e-5)
    spec = get_family({"model_type": "phi3"})
    geometry = spec.geometry(json.loads((fused / "config.json").read_text()))
    weights = load_file(fused / "model.safetensors")
    for name in list(weights):
        if "qkv_proj" in name:
            for part in ("q", "k", "v"):
                rows = spec.stored(part, geometry)[1]
                weights[name.replace("qkv", part)] = weights[name][rows].clone()
            del weights[name]
        elif "gate_up_proj" in name:
            gate, up = weights.pop(name).chunk(2)
            weights |= {name.replace("gate_up", "gate"): gate.clone(), name.replace("gate_up", "up"): up.clone()}
    save_file(weights, separate / "model.safetensors", metadata={"format": "pt"})
    torch.testing.assert_close(care_mla.load(separate)(IDS).logits, care_mla.load(fused)(IDS).logits, atol=1e-4, rtol=0)
    for layout in ("joint", "mla"):
        options = {"layout": layout, "qk_rope_head_dim": 6} if layout == "mla" else {"refit": True}
        logits = []
        for source in (fused, separate):
            out = tmp_path / f"{source.name}-{layout}"
            calibration = {"calibration": str(text_file), "samples": 16, "seqlen": 48}
            care_mla.convert(source, out, kv_save=0.5, calibration=calibration, **options)
            logits.append(care_mla.load(out)(IDS).logits)
        torch.testing.assert_close(*logits, atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    "entries",
    [
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            "rope_scaling": {"type": "linear", "factor": 4.0},
        },
        {
            "rope_parameters": {"rope_type": "linear", "factor": 2.0},
            "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
        },
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "rope_scaling": None, "rope_theta": 5e5},
        {"rope_scaling": {"type": "dynamic", "rope_type": "linear", "factor": 2.0}, "rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_scaling": {}},
    ],
)
def test_rope_in_two_styles_is_the_one_that_transformers_takes(entries: dict[str, object]) -> None:
    from transformers import AutoConfig

    taken = AutoConfig.for_model("llama", **COMMON, **entries).rope_parameters["rope_type"]
    found = LLAMA.features({**COMMON, **entries}).get("RoPE scaling", "default")
    assert found == taken


def test_rope_scaling_beside_parameters_by_layer_type() -> None:
    from transformers import AutoConfig

    kinds = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}
    entries = {"rope_parameters": kinds, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    found = GEMMA3.features({**COMMON, **entries})["RoPE scaling"]
    taken = AutoConfig.for_model("gemma3_text", **COMMON, **entries).rope_parameters
    assert found == taken["full_attention"]["rope_type"] and taken["sliding_attention"]["rope_type"] == "default"
