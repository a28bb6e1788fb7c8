"""One contract for every family: what a conversion must preserve, on tiny random models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from shelf import Shelf
from tiny import TINY
from torch import Tensor
from transformers import AutoModelForCausalLM

import care_mla
from care_mla.errors import CalibrationError, ConfigError, RankError, UnsupportedModelError
from care_mla.evaluation import measure_cache
from care_mla.families import BUILT_IN, FamilySpec, get_family
from care_mla.layouts import JOINT, LAYOUTS, MLA, require_expressible
from care_mla.modeling import CACHE_NAME, cache_of

pytestmark = pytest.mark.usefixtures("no_figures")

TOLERANCE = {"atol": 1e-4, "rtol": 0}


def _kv_width(source: Path) -> int:
    return care_mla.inspect(source).geometry.kv_width


def _key_scales(source: Path) -> int:
    """Cached scales of a layer in layout mla: one a kv head with QK-norm."""
    inspection = care_mla.inspect(source)
    return inspection.geometry.num_kv_heads if "QK-norm" in {name for name, *_ in inspection.features} else 0


@pytest.fixture(params=["split", "joint"])
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


def _mla_or_skip(source: Path) -> Path:
    spec, config = _family(source)
    try:
        require_expressible(spec.features(config), MLA, spec.model_type)
    except UnsupportedModelError as error:
        pytest.skip(f"{error}, see test_what_mla_cannot_express_is_refused")
    return source


def _family(source: Path) -> tuple[FamilySpec, dict[str, Any]]:
    config = json.loads((source / "config.json").read_text())
    return get_family(config), config


@pytest.fixture(params=["split", "joint", "mla"])
def parity_pair(request: pytest.FixtureRequest, family: str, shelf: Shelf) -> tuple[Any, Any]:
    """Source and its conversion at full rank (mla: all keys rotary, values at full rank), which must not differ."""
    source = _mla_or_skip(shelf.source(family)) if request.param == "mla" else shelf.source(family)
    n = _kv_width(source)
    options: dict[str, Any] = {"rank": n}
    if request.param == "mla":
        elements = care_mla.inspect(source).geometry.num_layers * (2 * n + _key_scales(source))
        options = {"cache_elements": elements, "qk_rope_head_dim": n, "ranks": "uniform"}
    return care_mla.load(source), care_mla.load(shelf.converted(family, layout=request.param, **options))


def _ids(*shape: int) -> Tensor:
    return torch.randint(3, 259, shape, generator=torch.Generator().manual_seed(5))


def _token_by_token(model: Any, ids: Tensor) -> Tensor:
    """Logits of a prompt of five tokens and then one token at a time from the cache."""
    cache, steps = None, []
    for step in (ids[:, :5], *(ids[:, i : i + 1] for i in range(5, ids.shape[1]))):
        output = model(step, **{CACHE_NAME: cache}, use_cache=True)
        cache = cache_of(output)
        steps.append(output.logits)
    return torch.cat(steps, dim=1)


def _only_layer_type(config: Any) -> str | None:
    types = set(getattr(config, "layer_types", None) or [])
    return types.pop() if len(types) == 1 else None


@torch.no_grad()
def test_kv_parity_equals_the_source(parity_pair: tuple[Any, Any]) -> None:
    """Prefill past the sliding window, token by token (past the length where longrope changes), and generating.

    One test, so that each pair is converted once.
    """
    source, converted = parity_pair
    ids = _ids(2, 24)
    torch.testing.assert_close(converted(ids, use_cache=False).logits, source(ids).logits, **TOLERANCE)
    torch.testing.assert_close(_token_by_token(converted, ids), _token_by_token(source, ids), **TOLERANCE)
    # Same cache policy: windowed layers keep a window.
    kept = [[layer.keys.shape[-2] for layer in cache_of(m(ids, use_cache=True)).layers] for m in (source, converted)]
    assert kept[0] == kept[1]
    assert (min(kept[0]) < ids.shape[1]) == bool(
        getattr(source.config, "sliding_window", None) and _only_layer_type(source.config) != "full_attention"
    )
    _generations_agree(source, converted)


def _generations_agree(source: Any, converted: Any) -> None:
    """Batched and left-padded, greedy and with beams, past the sliding window."""
    ids, mask = _ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    ids[0, :5] = 2
    for options in ({}, {"num_beams": 3}):
        both = [
            model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=12,
                do_sample=False,
                pad_token_id=2,
                eos_token_id=None,
                **options,
            )
            for model in (source, converted)
        ]
        assert torch.equal(*both)


@torch.no_grad()
def test_left_padding_does_not_matter(family: str, shelf: Shelf) -> None:
    converted = care_mla.load(shelf.converted(family, kv_save=0.64, layout="joint", min_rank=1))
    ids = _ids(1, 9)
    padded = torch.cat([torch.full((1, 4), 2), ids], dim=1)
    mask = torch.cat([torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 9, dtype=torch.long)], dim=1)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}
    assert torch.equal(
        converted.generate(ids, **options)[:, 9:], converted.generate(padded, attention_mask=mask, **options)[:, 13:]
    )


@torch.no_grad()
def test_truncation_equals_a_low_rank_edit_of_the_source(family: str, layout: str, shelf: Shelf) -> None:
    source = shelf.source(family)
    spec, config = _family(source)
    geometry = spec.geometry(config)
    out = shelf.converted(family, rank=max(1, geometry.kv_width // 3), layout=layout, refit=True)
    written = load_file(out / "model.safetensors")
    edited = care_mla.load(source)
    for layer in range(3):
        prefix = f"language_model.model.layers.{layer}.self_attn."
        down, k_up, v_up = (written[f"{prefix}{name}.weight"] for name in ("kv_a_proj", "k_b_proj", "v_b_proj"))
        attention = edited.model.layers[layer].self_attn
        attention.o_proj.weight.copy_(written[f"{prefix}o_proj.weight"])
        maps = {"k": k_up @ down[: k_up.shape[1]], "v": v_up @ down[-v_up.shape[1] :]}
        for projection, weight in maps.items():
            name, rows = spec.stored(projection, geometry)
            module = getattr(attention, name)
            module.weight[rows] = weight
            if module.bias is None:
                module.bias = torch.nn.Parameter(torch.zeros(module.out_features))
            module.bias[rows] = written[
                f"{prefix}{projection}_b_proj.bias"
            ]  # the source's, and what centring gives back
    ids = _ids(2, 24)
    torch.testing.assert_close(care_mla.load(out)(ids).logits, edited(ids).logits, **TOLERANCE)


@pytest.mark.parametrize("name", ["phi3", "gpt_oss", "olmo2"])
def test_refit_of_an_exact_conversion_changes_nothing(name: str, shelf: Shelf) -> None:
    """Fused rows, sinks and norms: the attention that is refitted is the one that was converted."""
    source = shelf.source(name)
    out = shelf.converted(name, rank=_kv_width(source), refit=True)
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    for layer in json.loads((out / "care_manifest.json").read_text())["layers"]:
        assert layer["output_error"]["before"] < 1e-6
    for o_proj in (n for n in before if n.endswith("o_proj.weight")):
        torch.testing.assert_close(after[f"language_model.{o_proj}"], before[o_proj], atol=2e-4, rtol=0)


@torch.no_grad()
def test_reload_equals_original_and_cache_holds_latents_only(
    family: str, layout: str, shelf: Shelf, tmp_path: Path
) -> None:
    converted = care_mla.load(shelf.converted(family, kv_save=0.64, layout=layout, min_rank=1))
    converted.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    ids = _ids(2, 7)
    torch.testing.assert_close(again(ids).logits, converted(ids).logits, atol=0, rtol=0)
    usage = measure_cache(converted, _ids(1, 7))
    assert usage.layer_widths == converted.config.kv_lora_rank
    assert len(set(usage.layer_widths)) > 1, "ranks were meant to differ between layers"
    spec, config = _family(shelf.source(family))
    rotations = (
        2 * 8 if "length-dependent RoPE" in spec.features(config) else 0
    )  # cos and sin of phi3-partial's 4 pairs
    assert usage.bytes_per_token == 4 * (sum(usage.layer_widths) + rotations) + 4  # float32 latents, one int32 position


@torch.no_grad()
@pytest.mark.parametrize("rope", ["free", "stock", "transmla"])
def test_mla_reads_its_cache_as_it_prefills(family: str, rope: str, shelf: Shelf, tmp_path: Path) -> None:
    """Truncated: absorbed decoding equals expanded prefill; what is cached is latent and rotary key; reloads; padding."""
    source = _mla_or_skip(shelf.source(family))
    scales = _key_scales(source)
    rope_width = care_mla.inspect(source).geometry.head_dim // 2
    out = shelf.converted(family, layout="mla", kv_save=0.3, qk_rope_head_dim=rope_width, rope=rope, context=64)
    converted = care_mla.load(out)
    ids = _ids(2, 24)
    expected = converted(ids, use_cache=False).logits
    torch.testing.assert_close(_token_by_token(converted, ids), expected, **TOLERANCE)
    assert "rotary key" in (out / "care_report.html").read_text()
    usage = measure_cache(converted, _ids(1, 7))
    assert usage.layer_widths == [rank + rope_width + scales for rank in converted.config.kv_lora_rank]
    assert usage.bytes_per_token == 4 * sum(usage.layer_widths)
    assert sum(usage.layer_widths) <= 0.7 * care_mla.inspect(source).geometry.cache_elements_per_token
    converted.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(again(ids).logits, converted(ids).logits, atol=0, rtol=0)
    padded = torch.cat([torch.full((2, 4), 2), ids[:, :9]], dim=1)
    mask = torch.cat([torch.zeros(2, 4, dtype=torch.long), torch.ones(2, 9, dtype=torch.long)], dim=1)
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}
    plain = converted.generate(ids[:, :9], **greedy)[:, 9:]
    assert torch.equal(plain, converted.generate(padded, attention_mask=mask, **greedy)[:, 13:])


MLA_LOSES = {
    "gemma2": {"soft-cap"},
    "gemma3": {"RoPE by layer type"},
    "phi3-partial": {"length-dependent RoPE", "partial RoPE"},
    "olmo2": {"QK-norm over the projection"},
    "smollm3": {"layers without RoPE"},
    "gpt_oss": {"attention sinks"},
}


@pytest.mark.parametrize("name", sorted(MLA_LOSES))
def test_what_mla_cannot_express_is_refused(name: str, shelf: Shelf, tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedModelError, match="which layout mla cannot express; choose --layout split or joint"
    ) as error:
        care_mla.convert(shelf.source(name), tmp_path / "out", kv_save=0.5, layout="mla")
    assert all(feature in str(error.value) and MLA.refuses[feature] in str(error.value) for feature in MLA_LOSES[name])
    assert not (tmp_path / "out").exists()


def test_every_feature_is_kept_or_refused_with_a_reason() -> None:
    for layout in LAYOUTS.values():
        assert not set(layout.keeps) & set(layout.refuses)
        assert set(layout.keeps) | set(layout.refuses) == set(JOINT.keeps)


def test_every_family_has_a_tiny_model() -> None:
    assert {spec.model_type for spec in BUILT_IN} == {entries["model_type"] for entries in TINY.values()}


@pytest.mark.parametrize(("rope_type", "more"), [("dynamic", {"factor": 2.0}), ("yarn", {"factor": 4.0})])
def test_mla_and_rope_scaling(rope_type: str, more: dict[str, float], shelf: Shelf, tmp_path: Path) -> None:
    """YaRN is exact, its attention factor included; frequencies that change with the length are refused."""
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, "original_max_position_embeddings": 32, **more}
    changes = {"rope_parameters": rope}
    source = shelf.source("llama", **changes)
    options: dict[str, Any] = {"layout": "mla", "ranks": "uniform", "rank": 32, "qk_rope_head_dim": 32}
    if rope_type == "dynamic":
        with pytest.raises(UnsupportedModelError, match="changes the frequencies"):
            care_mla.convert(source, tmp_path / "out", **options)
        return
    converted = care_mla.load(shelf.converted("llama", changes=changes, **options))
    ids = _ids(2, 24)
    expected = care_mla.load(source)(ids).logits
    torch.testing.assert_close(converted(ids).logits, expected, **TOLERANCE)
    # Where every token stands at position 0 nothing turns, and position-free keys are exact with the factor alone.
    options = {"layout": "mla", "ranks": "uniform", "cache_elements": 3 * (64 + 2), "qk_rope_head_dim": 2}
    partial = care_mla.load(shelf.converted("llama", changes=changes, **options))
    at_zero = {"position_ids": torch.zeros(2, 24, dtype=torch.long), "attention_mask": torch.ones(2, 24)}
    torch.testing.assert_close(
        partial(ids, **at_zero).logits, care_mla.load(source)(ids, **at_zero).logits, **TOLERANCE
    )


ROPE_KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {
        "original_max_position_embeddings": 16,
        "short_factor": [1.0 + i / 8 for i in range(8)],
        "long_factor": [2.0 + i for i in range(8)],
    },
}


@torch.no_grad()
@pytest.mark.parametrize("rope_type", sorted(ROPE_KINDS))
def test_every_kind_of_rope_scaling_is_carried_through(rope_type: str, layout: str, shelf: Shelf) -> None:
    """Prefill and decoding, past the original length; padded, too."""
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, **ROPE_KINDS[rope_type]}
    changes = {"rope_parameters": rope, "max_position_embeddings": 16}
    source = shelf.source("llama", **changes)
    out = shelf.converted("llama", changes=changes, rank=_kv_width(source), layout=layout, method="care")
    # Dynamic RoPE keeps the longest frequencies it has seen: each measurement starts from a fresh model.
    for measure in (lambda model: model(_ids(2, 24)).logits, lambda model: _token_by_token(model, _ids(2, 24))):
        torch.testing.assert_close(measure(care_mla.load(out)), measure(care_mla.load(source)), **TOLERANCE)
    _generations_agree(care_mla.load(source), care_mla.load(out))


def test_names_round_trip(family: str, shelf: Shelf) -> None:
    """Everything but the key and value projections is copied bit for bit under its own name."""
    source = shelf.source(family)
    out = shelf.converted(family, kv_save=0.5, method="care")
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    spec, config = _family(source)
    if spec.qkv_proj is not None:  # the rows of q become q_proj
        _, rows = spec.stored("q", spec.geometry(config))
        before |= {
            name.replace(spec.qkv_proj, "q_proj"): before[name][rows] for name in before if spec.qkv_proj in name
        }
    kept = {name for name in before if not any(part in name for part in (".k_proj.", ".v_proj.", ".qkv_proj."))}
    assert {f"language_model.{name}" for name in kept} == {
        name for name in after if "kv_a_proj" not in name and "_b_proj" not in name
    }
    assert all(torch.equal(before[name], after[f"language_model.{name}"]) for name in kept)
    for name in (n for n in before if n.endswith(("k_proj.bias", "v_proj.bias"))):
        assert torch.equal(before[name], after["language_model." + name.replace("_proj", "_b_proj")])


def test_mla_chooses_its_rotary_width(tiny: Callable[..., Path], tmp_path: Path, text_file: Path) -> None:
    """Without --qk-rope-head-dim: the width of least predicted loss, the others in the manifest; forecasts agree."""
    source = tiny("llama", head_dim=32)
    stats = care_mla.calibrate(
        source, tmp_path / "stats", calibration=str(text_file), samples=8, seqlen=48, fisher=True
    )
    manifest = care_mla.convert(source, tmp_path / "out", stats=stats, layout="mla", kv_save=0.5)
    by_width = manifest["predicted_by_rotary_width"]
    assert list(by_width) == ["16", "32", "48"], "64 would leave no latent"
    price = {int(width): lost["rotation"] + 4.0 * lost["latent"] for width, lost in by_width.items()}
    assert manifest["plan"]["qk_rope_head_dim"] == min(price, key=price.__getitem__)
    (forecast,) = care_mla.plan_ranks(source, stats, kv_save=[0.5], recipes=[{"layout": "mla"}])
    assert forecast.plan.to_dict() == manifest["plan"]
    stock = care_mla.convert(source, tmp_path / "stock", stats=stats, layout="mla", kv_save=0.5, rope="stock")
    assert list(stock["predicted_by_rotary_width"]) == ["16", "32"]
    with pytest.raises(ConfigError, match="--freq-fold 2"):
        care_mla.convert(source, tmp_path / "no", stats=stats, layout="mla", kv_save=0.5, freq_fold=2)
    options = {"method": "balanced_pca", "rope": "transmla", "freq_fold": 4}
    folded = care_mla.convert(source, tmp_path / "fold", stats=stats, layout="mla", kv_save=0.5, **options)
    assert folded["plan"]["qk_rope_head_dim"] == 32 and folded["predicted_by_rotary_width"] == {}


@torch.no_grad()
def test_low_rank_queries(family: str, shelf: Shelf, tmp_path: Path) -> None:
    """Full rank equals exact queries, biases and norms included; less loses something, decodes as it prefills, and reloads."""
    source = _mla_or_skip(shelf.source(family))
    geometry = care_mla.inspect(source).geometry
    n, full = geometry.kv_width, min(geometry.hidden_size, geometry.num_heads * geometry.head_dim)
    elements = geometry.num_layers * (2 * n + _key_scales(source))
    options = {"layout": "mla", "cache_elements": elements, "qk_rope_head_dim": n, "ranks": "uniform"}
    exact = shelf.converted(family, **options, q_lora_rank=full)
    manifest = json.loads((exact / "care_manifest.json").read_text())
    assert manifest["recipe"]["q_lora_rank"] == full
    assert all(layer["relative_error"]["q"] < 1e-9 for layer in manifest["layers"])
    ids = _ids(2, 24)
    torch.testing.assert_close(care_mla.load(exact)(ids).logits, care_mla.load(source)(ids).logits, **TOLERANCE)
    lower = shelf.converted(family, **options, q_lora_rank=full // 3)
    less = care_mla.load(lower)
    expected = less(ids, use_cache=False).logits
    torch.testing.assert_close(_token_by_token(less, ids), expected, **TOLERANCE)
    less.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(care_mla.load(tmp_path / "again")(ids).logits, expected, atol=0, rtol=0)
    names = load_file(lower / "model.safetensors")
    assert not [name for name in names if name.endswith(".q_proj.weight")], "the exact queries were copied too"


def test_impossible_query_ranks(shelf: Shelf, tmp_path: Path, text_file: Path) -> None:
    source, out = shelf.source("llama"), tmp_path / "out"
    for rank, layout, message in (
        (0, "mla", "--q-lora-rank 0"),
        (49, "mla", "outside 1..48"),
        (8, "joint", "--q-lora-rank does not apply to --layout joint"),
    ):
        with pytest.raises((ConfigError, RankError), match=message):
            care_mla.convert(source, out, stats=shelf.statistics("llama"), kv_save=0.5, layout=layout, q_lora_rank=rank)
    stats = care_mla.calibrate(
        source, tmp_path / "stats", calibration=str(text_file), samples=4, seqlen=48, fisher=True
    )
    with pytest.raises(CalibrationError, match="--q-lora-rank needs the input second moment"):
        care_mla.convert(source, out, stats=stats, kv_save=0.5, layout="mla", q_lora_rank=8)
    assert not out.exists()


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3", "qwen3-mqa-bias", "qwen3_moe"])
def test_linearized_qk_norm(name: str, shelf: Shelf) -> None:
    """No scales in the cache or the budget; decodes as it prefills; near the source."""
    source = shelf.source(name)
    n = _kv_width(source)
    options = {"layout": "mla", "cache_elements": 6 * n, "qk_rope_head_dim": n, "ranks": "uniform"}
    out = shelf.converted(name, qk_norm="linear", **options)
    converted, ids = care_mla.load(out), _ids(2, 24)
    expected = converted(ids, use_cache=False).logits
    torch.testing.assert_close(_token_by_token(converted, ids), expected, **TOLERANCE)
    assert measure_cache(converted, ids[:1]).layer_widths == [2 * n] * 3
    assert not [name for name in load_file(out / "model.safetensors") if "q_norm" in name or "k_norm" in name]
    logits = care_mla.load(source)(ids).logits
    assert (expected - logits).square().mean() < 0.5 * logits.var()
