"""Whatever a config.json holds, a command answers with a result or with one sentence."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from conftest import DATA, ROOT

PUBLISHED = DATA / "configs" / "published.jsonl"
CASES = int(os.environ.get("CARE_PROPERTY_CASES", "0"))
"""How many malformed config.json; 0: the few of the suite."""

VALUES: tuple[Any, ...] = (
    None,
    "",
    "many",
    "\ud800",
    "[/b]",
    0,
    -1,
    1,
    3,
    2**31,
    10**9,
    10**30,
    0.5,
    -2.5,
    1e300,
    float("nan"),
    float("inf"),
    True,
    False,
    [],
    {},
    [1, "two"],
    [None],
    {"rope_type": "default"},
    {"factor": None},
    [[[]]],
)
ROPE: tuple[Any, ...] = (
    "linear",
    ["linear"],
    {"type": "linear", "factor": None},
    {"type": "linear"},
    {"rope_type": "no such"},
    {"rope_type": None},
    {"rope_type": ["llama3"]},
    {"rope_type": "yarn", "factor": "4"},
    {"rope_type": "yarn", "factor": 0},
    {"rope_type": "llama3", "factor": 8.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0},
    {"rope_type": "longrope", "short_factor": [1.0], "long_factor": "x"},
    {
        "rope_type": "longrope",
        "short_factor": [1.0] * 3,
        "long_factor": [1.0] * 3,
        "original_max_position_embeddings": 8,
    },
    {"full_attention": {"rope_type": "default"}, "sliding_attention": None},
    {"rope_type": "default", "rope_theta": 0},
    {"rope_type": "default", "partial_rotary_factor": 2.0},
)


def _published() -> list[dict[str, Any]]:
    lines = PUBLISHED.read_text(encoding="utf-8").splitlines() if PUBLISHED.is_file() else []
    return [json.loads(line)["config"] for line in lines]


def _originals() -> list[dict[str, Any]]:
    """Real config.json: those of the repository, and the published ones where they are; convertible ones count more."""
    golden = [json.loads(path.read_text()) for path in sorted((ROOT / "tests" / "golden" / "configs").glob("*.json"))]
    return golden * 4 + _published()


def _mutated(config: dict[str, Any], dice: random.Random) -> dict[str, Any]:
    """One to three entries lost, retyped, moved or of another size."""
    config = deepcopy(config)
    for _ in range(dice.randint(1, 3)):
        name = dice.choice(sorted(config)) if config else "model_type"
        how = dice.randrange(8)
        if how == 0:
            config.pop(name, None)
        elif how == 1:
            config = {**config, "text_config": deepcopy(config)} if dice.random() < 0.5 else {"text_config": config}
        elif how == 2:
            config["rope_scaling" if dice.random() < 0.5 else "rope_parameters"] = deepcopy(dice.choice(ROPE))
        elif how == 3:
            words = ("full_attention", "sliding_attention", "linear_attention", "no such", None, 3)
            layers = config.get("num_hidden_layers")
            count = dice.choice((0, 1, layers % 1000 if isinstance(layers, int) else 1))
            config["layer_types"] = [dice.choice(words[: dice.choice((1, 2, 6))]) for _ in range(count)]
        elif how == 4:
            new = dice.choice(
                ("no_rope_layers", "sliding_window_pattern", "use_sliding_window", "dtype", "per_layer_config")
            )
            config[new] = deepcopy(dice.choice(VALUES))
        elif how == 5 and isinstance(config.get(name), int | float):
            config[name] = config[name] * dice.choice((-1, 0.5, 2, 3)) + dice.choice((0, 1))
        else:
            config[name] = deepcopy(dice.choice(VALUES))
    return config


@pytest.fixture
def answers(care: Callable[..., str], tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Give a config.json to inspect, plan and convert; returns what inspect said."""
    source = tmp_path / "model"
    source.mkdir()

    def give(config: dict[str, Any], *, every: bool = True) -> str:
        (source / "config.json").write_text(json.dumps(config))
        said = []
        for command in (
            ("inspect", source),
            ("plan", source),
            ("convert", source, "--out", tmp_path / "out", "--kv-save", "0.5"),
        )[: 3 if every else 1]:
            try:
                said.append(care(*command))
            except AssertionError as refused:
                said.append(str(refused.args[0]).split("\nassert ")[0])
                assert said[-1].startswith("error: ") and said[-1].count("\n") <= 1, said[-1]
        assert not every or (said[2].startswith("error: ") and not (tmp_path / "out").exists())  # there are no weights
        return said[0]

    yield give


@pytest.mark.parametrize("seed", range(max(2, CASES // 20)))
def test_malformed_configs_are_refused_in_a_sentence(seed: int, answers: Callable[..., str]) -> None:
    dice, originals = random.Random(seed), _originals()
    for _ in range(20):
        config = _mutated(dice.choice(originals), dice)
        try:
            answers(config)
        except BaseException:
            print(json.dumps(config)[:3000])
            raise


def test_published_configs_are_read_or_refused_for_a_true_reason(answers: Callable[..., str]) -> None:
    if not PUBLISHED.is_file():
        pytest.skip(f"{PUBLISHED} is absent: these config.json are not in the repository")
    seen = set()
    for config in _published():
        kind = config["model_type"]
        if kind not in seen:  # one of each; CARE_PROPERTY_CASES reads them all
            said = answers(config, every=bool(CASES))
            assert not said.startswith("error: config.json") or "original_max_position_embeddings" in said, said
        if not CASES:
            seen.add(kind)


WRAPPED = {"model_type": "qwen3", "num_hidden_layers": 2}
REASONS = [
    (
        {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}},
        "wraps a text model.*text model is a gemma3_text",
    ),
    ({"model_type": "llava", "text_config": WRAPPED, "vision_config": {}}, "takes text models alone"),
    ({"model_type": "llama4", "text_config": {"model_type": "llama4_text"}}, "text model is a llama4_text"),
    ({"model_type": "internvl_chat", "llm_config": WRAPPED}, "llm_config"),
    ({"model_type": "qwen2_5_vl", "vision_config": {"depth": 2}}, "reads more than text"),
    ({"model_type": "gemma3n"}, "reads more than text"),
    (
        {"model_type": "kimi_k25", "text_config": {"model_type": "kimi_k2", "kv_lora_rank": 512}},
        "Multi-head Latent Attention already",
    ),
    ({"model_type": "deepseek_v3", "kv_lora_rank": 512}, r"Latent Attention already \(kv_lora_rank = 512\)"),
    ({"model_type": "minicpm3", "kv_lora_rank": 256}, "nothing to convert"),
    ({"model_type": "longcat_flash"}, "Latent Attention already"),
    ({"model_type": "mamba2"}, "has no attention"),
    ({"model_type": "rwkv7"}, "has no attention"),
    ({"model_type": "qwen3_next"}, "layers without attention"),
    ({"model_type": "nemotron_h", "hybrid_override_pattern": "M-M*"}, "hybrid_override_pattern"),
    ({"model_type": "new", "layer_types": ["full_attention", "linear_attention"]}, "layer_types: linear_attention"),
    ({"model_type": "granitemoehybrid", "layer_types": ["attention", "attention"]}, "has no family spec"),
    ({"model_type": "bert", "architectures": ["BertModel"]}, "is an encoder"),
    ({"model_type": "t5", "is_encoder_decoder": True}, "an encoder and a decoder"),
    ({"model_type": "nemotron-nas", "block_configs": [{}]}, "layers that differ"),
    ({"model_type": "gpt_neox", "auto_map": {"AutoModel": "x"}}, "no family spec.*never run"),
    ({"model_type": "qwen3", "per_layer_config": {"0": {"head_dim": 8}}}, "per_layer_config"),
]


@pytest.mark.parametrize(
    ("config", "says"), REASONS, ids=lambda value: value.get("model_type") if isinstance(value, dict) else ""
)
def test_models_that_are_no_source_are_told_why(config: dict[str, Any], says: str) -> None:
    from care_mla.errors import UnsupportedModelError
    from care_mla.families import get_family

    with pytest.raises(UnsupportedModelError, match=says):
        get_family(config)
