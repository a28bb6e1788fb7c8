"""A config.json that is not built because it is ordinary would be built, and as the model that was read."""

from __future__ import annotations

import json
import random
from copy import deepcopy
from typing import Any

import pytest
from conftest import DATA, ROOT
from tiny import COMMON, TINY

from care_mla.errors import ConversionError
from care_mla.families import get_family
from care_mla.families.ordinary import NEEDED, PLAIN, is_ordinary
from care_mla.modeling import require_buildable

GOLDEN = {
    path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "tests" / "golden" / "configs").glob("*.json"))
}
VALUES: tuple[Any, ...] = (
    None,
    "",
    "silu",
    0,
    -1,
    1,
    3,
    64,
    2**31,
    0.5,
    1.0,
    1e-6,
    float("nan"),
    True,
    False,
    [],
    [1],
    {},
)
ROPE: tuple[Any, ...] = (
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "linear", "factor": 2},
    {"rope_type": "linear"},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 4.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    {"rope_type": "llama3", "factor": 8.0},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_theta": 1e6, "rope_type": "default"},
    {"rope_theta": 1e6},
)


def _is_ordinary(config: dict[str, Any]) -> bool:
    try:
        family = get_family(config)
        family.geometry(config)
        return is_ordinary(config, family)
    except ConversionError:
        return False  # refused before it is asked


def _small(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "num_hidden_layers": 2} if isinstance(config.get("num_hidden_layers"), int) else config


@pytest.mark.parametrize(
    "name", ["llama-3.1-8b", "llama-3.1-70b", "qwen2.5-1.5b", "qwen3-4b-instruct-2507", "mistral-7b-v0.3"]
)
def test_the_models_that_people_have_are_ordinary(name: str) -> None:
    assert _is_ordinary(GOLDEN[name])


@pytest.mark.parametrize("seed", range(4))
def test_what_is_ordinary_is_buildable(seed: int) -> None:
    """Golden and tiny configs, one to three entries lost or replaced; all that pass as ordinary are built."""
    dice, passed = random.Random(seed), 0
    originals = [_small(config) for config in GOLDEN.values()] + [
        {**COMMON, "model_type": name, **changes} for name, changes in TINY.items()
    ]
    for _ in range(400):
        config = deepcopy(dice.choice(originals))
        for _ in range(dice.randint(1, 3)):
            name = dice.choice(sorted({*config, *PLAIN}))
            how = dice.randrange(5)
            if how == 0:
                config.pop(name, None)
            elif how == 1:
                config[dice.choice(("rope_parameters", "rope_scaling"))] = deepcopy(dice.choice(ROPE))
            elif how == 2 and isinstance(config.get(name), int | float):
                config[name] = config[name] * dice.choice((-1, 0.5, 2, 3)) + dice.choice((0, 1))
            else:
                config[name] = deepcopy(dice.choice(VALUES))
        if _is_ordinary(config):
            passed += 1
            require_buildable(config)
    assert passed >= 10


def test_published_configs() -> None:
    published = DATA / "configs" / "published.jsonl"
    if not published.is_file():
        pytest.skip(f"{published} is absent: these config.json are not in the repository")
    configs = [json.loads(line)["config"] for line in published.read_text(encoding="utf-8").splitlines()]
    ordinary = [config for config in configs if _is_ordinary(config)]
    for config in ordinary:
        require_buildable(_small(config))
    assert len(ordinary) >= 20


@pytest.mark.parametrize("name", NEEDED)
def test_what_classes_fill_in_must_be_written(name: str) -> None:
    config = dict(GOLDEN["qwen3-4b-instruct-2507"])
    del config[name]
    assert not _is_ordinary(config)
