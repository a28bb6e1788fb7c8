"""Verdicts on engines follow from what exports hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import care_mla
from care_mla.errors import ConfigError
from care_mla.export.engines import ENGINES, EXPRESSES, LOST, VLLM_LOST, VLLM_WIDTHS, EngineVerdict, verdict
from care_mla.geometry import Geometry
from care_mla.layouts import JOINT, MLA

LLAMA_8B = Geometry(num_layers=32, hidden_size=4096, num_heads=32, num_kv_heads=8, head_dim=128)
"""Caches 2048 elements a layer."""


def _verdicts(
    features: dict[str, str],
    geometry: Geometry = LLAMA_8B,
    exports: tuple[str, ...] = ("deepseek-v3",),
    dtype: str = "bfloat16",
) -> dict[str, EngineVerdict]:
    return {one.name: verdict(one, features, geometry, exports=exports, dtype=dtype) for one in ENGINES}


def test_a_plain_model_runs_everywhere_and_vllm_saves_what_its_widths_leave() -> None:
    found = _verdicts({"tied embeddings": "yes"})
    assert all(one.able for one in found.values())
    assert found["own"].savings is None and found["transformers"].savings is None
    assert found["vllm"].savings == tuple(1 - width / 2048 for width in VLLM_WIDTHS)
    assert "--no-centre" in found["vllm"].needs and "--no-centre" not in found["transformers"].needs


def test_a_cache_no_larger_than_the_widths_saves_nothing_in_vllm() -> None:
    small = Geometry(num_layers=2, hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16)
    found = _verdicts({}, small)
    assert not found["vllm"].able and "caches 64 already" in found["vllm"].reasons[0]
    assert found["transformers"].able


@pytest.mark.parametrize(
    ("feature", "able"),
    [
        ("qkv bias", {"own", "transformers", "vllm-transformers"}),
        ("RoPE scaling", {"own", "transformers", "vllm-transformers"}),
        ("QK-norm", {"own", "transformers", "vllm", "vllm-transformers"}),
        ("sliding window", {"own"}),
        ("soft-cap", {"own"}),
    ],
)
def test_a_feature_is_held_or_named(feature: str, able: set[str]) -> None:
    found = _verdicts({feature: "here"})
    assert {name for name, one in found.items() if one.able} == able
    assert all(feature in one.reasons[0] for one in found.values() if not one.able)


def test_what_a_conversion_needs_for_an_engine_is_said() -> None:
    assert "--qk-norm linear" in _verdicts({"QK-norm": "per head"})["transformers"].needs
    assert "--qk-rope-head-dim 128" in _verdicts({"RoPE scaling": "yarn"})["transformers"].needs
    assert "--dtype bfloat16" in _verdicts({}, dtype="float16")["vllm"].needs
    assert "outside attention" in _verdicts({}, exports=())["transformers"].reasons[0]


def test_every_feature_is_kept_lost_or_refused_with_a_reason() -> None:
    for feature in JOINT.keeps:
        stock = feature in EXPRESSES["transformers"] or feature in LOST or feature in MLA.refuses
        assert stock and (feature in EXPRESSES["vllm"] or feature in LOST | VLLM_LOST or feature in MLA.refuses), (
            feature
        )


def test_inspect_tells_engines_and_sizes(tiny: Callable[..., Path]) -> None:
    source = tiny()
    one, many = care_mla.inspect(source), care_mla.inspect(source, batch=8)
    assert [verdict.engine for verdict in one.engines] == [engine.name for engine in ENGINES]
    now = one.budgets[0]
    assert now.cache_gib[8192] == 8192 * now.elements * one.element_bytes / 2**30
    assert many.budgets[1].cache_gib[32768] == 8 * one.budgets[1].cache_gib[32768]
    with pytest.raises(ConfigError, match="--batch 0"):
        care_mla.inspect(source, batch=0)
