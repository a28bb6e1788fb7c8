"""SmolLM2-135M-Instruct against reference numbers, where ../shared/data is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import care_mla

pytestmark = [
    pytest.mark.xdist_group("reference perplexity"),  # its tests share their statistics
    pytest.mark.usefixtures("no_figures"),
]

REFERENCE = json.loads((Path(__file__).parents[1] / "golden" / "one_shot.json").read_text())


@pytest.fixture(scope="module")
def reference_statistics(real_model: Path, shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reference") / "stats"
    return care_mla.calibrate(real_model, out, calibration=str(shared_data / "wikitext2" / "valid.tokens.txt"))


@pytest.mark.parametrize("layout", ["split", "joint"])
def test_reference_perplexity(
    layout: str, real_model: Path, shared_data: Path, tmp_path: Path, reference_statistics: Path
) -> None:
    """The published protocol: care, uniform, 50% saving, 8 x 512 tokens of the tokenised WikiText-2 test text."""
    out = tmp_path / "out"
    care_mla.convert(
        real_model, out, stats=reference_statistics, layout=layout, method="care", ranks="uniform", kv_save=0.5
    )
    result = care_mla.evaluate(out, str(shared_data / "wikitext2" / "test.tokens.txt"))
    assert result["perplexity"] == pytest.approx(REFERENCE["care"][layout]["0.5"], rel=0.005)
