"""SmolLM2-135M-Instruct against reference numbers, where ../shared/data is."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

import care_mla

pytestmark = [
    pytest.mark.xdist_group("reference perplexity"),  # its tests share their statistics
    pytest.mark.usefixtures("no_figures"),
]

REFERENCE = json.loads((Path(__file__).parents[1] / "golden" / "one_shot.json").read_text())["care"]


@pytest.fixture(scope="module")
def statistics(real_model: Path, shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """statistics(128) -> of so many windows of 256 tokens of the tokenised WikiText-2 validation text."""
    directory = tmp_path_factory.mktemp("reference")

    @cache
    def calibrate(samples: int) -> Path:
        text = str(shared_data / "wikitext2" / "valid.tokens.txt")
        return care_mla.calibrate(real_model, directory / str(samples), calibration=text, samples=samples)

    return calibrate


@pytest.mark.parametrize("samples", [32, pytest.param(128, marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", ["split", "joint"])
def test_reference_perplexity(
    layout: str, samples: int, real_model: Path, shared_data: Path, tmp_path: Path, statistics: Callable[[int], Path]
) -> None:
    """care, uniform ranks, 50% saving, 8 x 512 tokens of the tokenised WikiText-2 test text; 128 windows are the published protocol."""
    out = tmp_path / "out"
    care_mla.convert(
        real_model, out, stats=statistics(samples), layout=layout, method="care", ranks="uniform", kv_save=0.5
    )
    result = care_mla.evaluate(out, str(shared_data / "wikitext2" / "test.tokens.txt"))
    assert result["perplexity"] == pytest.approx(REFERENCE[layout][f"0.5, {samples} windows"], rel=0.005)
