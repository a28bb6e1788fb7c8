"""Published models from their config.json alone: key names, shapes, features and cache budgets.

The files in `configs` were written by hand from the published ones, without what no attention depends on. Regenerate `published_models.json`
with `python tests/golden/test_published_models.py` and read the difference.
"""

from __future__ import annotations

import json
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import care_mla
from care_mla.cli import main
from care_mla.families import get_family
from care_mla.layouts import JOINT
from care_mla.ranks import make_budget

HERE = Path(__file__).parent
CONFIGS = sorted((HERE / "configs").glob("*.json"))
GOLDEN = HERE / "published_models.json"
BUDGETS = (0.5, 0.75, 0.875)


def _describe(path: Path) -> dict[str, Any]:
    """Every weight's shape on the meta device (layers folded where alike), features, and cached elements."""
    config = json.loads(path.read_text())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    shapes: dict[str, list[int]] = {}
    counts: dict[str, int] = {}
    for name, tensor in model.state_dict().items():
        folded = re.sub(r"\.layers\.\d+\.", ".layers.*.", name)
        assert shapes.setdefault(folded, list(tensor.shape)) == list(tensor.shape)
        counts[folded] = counts.get(folded, 0) + 1
    spec = get_family(config)
    return {
        "tensors": {name: {"shape": shape, "count": counts[name]} for name, shape in shapes.items()},
        "features": spec.features(config),
        "geometry": spec.geometry(config).to_dict(),
        "cache_elements": [
            make_budget(spec.geometry(config), JOINT, kv_save=saved).elements for saved in (0.0, *BUDGETS)
        ],
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_names_shapes_features_and_budgets(path: Path) -> None:
    assert _describe(path) == json.loads(GOLDEN.read_text())[path.stem]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_projections_are_where_the_spec_says(path: Path) -> None:
    """The spec's names and rows against transformers' own model, biases and norms included."""
    config = json.loads(path.read_text())
    spec = get_family(config)
    geometry = spec.geometry(config)
    tensors = json.loads(GOLDEN.read_text())[path.stem]["tensors"]
    prefix = f"{spec.layers}.*.{spec.attention}."
    widths = {"q": geometry.num_heads * geometry.head_dim, "k": geometry.kv_width, "v": geometry.kv_width}
    for projection, width in widths.items():
        name, _ = spec.stored(projection, geometry)
        assert tensors[f"{prefix}{name}.weight"] == {
            "shape": [width, geometry.hidden_size],
            "count": geometry.num_layers,
        }
        assert (f"{prefix}{name}.bias" in tensors) == ("qkv bias" in spec.features(config))
    assert (f"{prefix}{spec.k_norm}.weight" in tensors) == ("QK-norm" in spec.features(config))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_inspect_and_plan_print_the_budgets(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a directory with config.json and nothing else."""
    golden = json.loads(GOLDEN.read_text())[path.stem]
    (tmp_path / "config.json").write_text(path.read_text())
    monkeypatch.setenv("COLUMNS", "250")
    for command in ("inspect", "plan"):
        monkeypatch.setattr(sys, "argv", ["care", command, str(tmp_path)])
        with suppress(SystemExit):
            main()
        printed = capsys.readouterr().out
        assert all(str(elements) in printed for elements in golden["cache_elements"]), printed
    plans = care_mla.plan_uniform(tmp_path, kv_save=BUDGETS)
    assert [plan.cache_elements_per_token for plan in plans] == golden["cache_elements"][1:] * 2


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({path.stem: _describe(path) for path in CONFIGS}, indent=1) + "\n")
