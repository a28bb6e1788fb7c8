"""What engines take, as data, each fact with its reason. Read without torch: `care inspect` gives a verdict of each engine from here, and
exports and conversions refuse by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from care_mla.geometry import Geometry
from care_mla.layouts.features import MLA_REFUSES

Engine = Literal["transformers", "vllm"]
"""Engines that `care export` writes for."""

STOCK = "deepseek-v3"
"""The stock class that the engines below load without custom code: layout mla, exported."""

EXPRESSES: dict[Engine, dict[str, str]] = {
    "transformers": {
        "qkv bias": "attention_bias, queries through q_a_proj with a constant input of one",
        "RoPE scaling": "default, linear and llama3 as they are, yarn where all frequencies are kept",
        "tied embeddings": "lm_head written out",
    },
    "vllm": {"tied embeddings": "lm_head written out"},
}
"""By engine: features of a source (`FamilySpec.features`) that survive in a stock checkpoint."""

VLLM_WIDTHS = (320, 512, 576)
"""latent + rotary key of a layer that vLLM takes: checked on the config, whatever the attention backend."""

LOST: dict[str, str] = {
    "fused qkv": "no export was written for fused projections",
    "attention scale": "DeepseekV3 divides scores by the root of its own key width alone",
    "sliding window": "DeepseekV3 has no windows",
    "QK-norm": "DeepseekV3 has no norms of queries and keys",
}
"""Features that layout mla keeps and the stock class does not -> why."""

VLLM_LOST: dict[str, str] = {
    "qkv bias": "vLLM's own model drops biases",
    "RoPE scaling": "vLLM's own model makes a variant of YaRN of any scaling",
}


@dataclass(frozen=True)
class EngineFacts:
    """One way to run a converted model.

    Attributes:
        name: short; `care export --engine` for those that an export is for.
        title: as tables show it.
        stock: whether it loads the stock class only; otherwise it takes whatever a layout can be.
        expresses: features that survive there.
        lost: feature -> why it does not.
        widths: cached elements of one layer (latent + rotary key) that it takes; (): any.
        needs: options of a conversion that it needs, whatever the source.
        tried: what is known of it by running it.
    """

    name: str
    title: str
    stock: bool
    expresses: Mapping[str, str]
    lost: Mapping[str, str]
    widths: tuple[int, ...]
    needs: tuple[str, ...]
    tried: str


ENGINES: tuple[EngineFacts, ...] = (
    EngineFacts("own", "care-mla's classes", False, {}, {}, (), (), "run: its cache is measured by every evaluation"),
    EngineFacts(
        "transformers",
        "transformers, stock class",
        True,
        EXPRESSES["transformers"],
        LOST,
        (),
        ("--layout mla", "--rope stock"),
        "run: caches latents, and expands all of them at each step",
    ),
    EngineFacts(
        "vllm",
        "vLLM, its own model",
        True,
        EXPRESSES["vllm"],
        LOST | VLLM_LOST,
        VLLM_WIDTHS,
        ("--layout mla", "--rope stock", "--ranks uniform", "--no-centre"),
        "run on a CPU only",
    ),
    EngineFacts(
        "vllm-transformers",
        "vLLM, --model-impl transformers",
        True,
        EXPRESSES["transformers"],
        LOST,
        VLLM_WIDTHS,
        ("--layout mla", "--rope stock", "--ranks uniform"),
        "what it caches was not measured, so the savings are at most these",
    ),
)


@dataclass(frozen=True)
class EngineVerdict:
    """Whether an engine can run a conversion of one source.

    Attributes:
        engine, title: see `EngineFacts`.
        reasons: why not; empty where it can.
        needs: options of `care convert` that it takes.
        savings: shares of the cache that it can hold, largest first; None: any.
        tried: what is known of the engine by running it.
    """

    engine: str
    title: str
    reasons: tuple[str, ...]
    needs: tuple[str, ...]
    savings: tuple[float, ...] | None
    tried: str

    @property
    def able(self) -> bool:
        """Whether nothing stands in the way."""
        return not self.reasons


def width_savings(widths: tuple[int, ...], geometry: Geometry) -> tuple[float, ...]:
    """Shares of the cache that the widths of an engine save, largest first; widths that save nothing are left out."""
    return tuple(1.0 - width / (2 * geometry.kv_width) for width in sorted(widths) if width < 2 * geometry.kv_width)


def verdict(
    engine: EngineFacts, features: Mapping[str, str], geometry: Geometry, *, exports: tuple[str, ...], dtype: str
) -> EngineVerdict:
    """What an engine can do for a source.

    Args:
        features, exports: of the source, see `FamilySpec`.
        dtype: in which it is stored.
    """
    if not engine.stock:
        return EngineVerdict(engine.name, engine.title, (), (), None, engine.tried)
    reasons, needs = [], list(engine.needs)
    if STOCK not in exports:
        reasons.append("its decoder layers are not those of DeepseekV3 outside attention")
    for feature in features:
        if feature in MLA_REFUSES:
            reasons.append(f"{feature}: {MLA_REFUSES[feature]}")
        elif feature == "QK-norm":
            needs.append("--qk-norm linear")
        elif feature not in engine.expresses:
            reasons.append(f"{feature}: {engine.lost.get(feature, 'DeepseekV3 cannot hold it')}")
    if "yarn" in features.get("RoPE scaling", "") and "RoPE scaling" in engine.expresses:
        needs.append(f"--qk-rope-head-dim {geometry.head_dim}")
    if dtype == "float16":
        needs.append("--dtype bfloat16")
    savings = width_savings(engine.widths, geometry) if engine.widths else None
    if savings == ():
        reasons.append(
            f"it takes {', '.join(map(str, engine.widths))} cached elements a layer, and this model caches {2 * geometry.kv_width} already"
        )
    return EngineVerdict(
        engine.name, engine.title, tuple(reasons), tuple(needs), None if reasons else savings, engine.tried
    )
