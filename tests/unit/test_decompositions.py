"""How many eigendecompositions a conversion takes: the matrices are [2n, 2n], and nothing costs more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import write_tiny_model

import care_mla

LAYERS = 2


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Callable[..., tuple[Path, Path]]:
    def make(**changes: Any) -> tuple[Path, Path]:
        directory = tmp_path_factory.mktemp("decompositions")
        source = write_tiny_model(directory / "source", "llama", num_hidden_layers=LAYERS, **changes)
        text = {"calibration": str(text_file), "samples": 16, "seqlen": 32}
        return source, care_mla.calibrate(source, directory / "stats", fisher=True, **text)

    return make


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """Width -> number of real symmetric matrices of it that were factorized."""
    counted: Counter[int] = Counter()
    eigh = torch.linalg.eigh

    def count(matrix: torch.Tensor) -> Any:
        if not matrix.is_complex():
            counted[len(matrix)] += 1
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", count)
    return counted


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"layout": "joint"}, {64: 2}),  # G, and the outputs under it
        ({"layout": "split"}, {64: 1, 32: 4}),  # G for its power; of keys and of values, G's block and the outputs
        ({"layout": "mla", "qk_rope_head_dim": 16}, {64: 2}),
        ({"layout": "mla"}, {64: 1 + 3}),  # G; the outputs at two rotary widths, and once more at the better one
        ({"layout": "joint", "method": "care"}, {64: 1}),
        ({"layout": "split", "method": "care"}, {32: 2}),
    ],
)
def test_of_a_layer(
    options: dict[str, Any],
    expected: dict[int, int],
    statistics: Callable[..., tuple[Path, Path]],
    sizes: Counter[int],
    tmp_path: Path,
) -> None:
    source, stats = statistics(hidden_size=96)
    care_mla.convert(source, tmp_path / "out", stats=stats, kv_save=0.4, **options)
    assert sizes == {width: LAYERS * count for width, count in expected.items()}


@pytest.mark.usefixtures("no_figures")
def test_of_a_layer_with_fewer_inputs_than_outputs(
    statistics: Callable[..., tuple[Path, Path]], sizes: Counter[int], tmp_path: Path
) -> None:
    """MHA: keys and values, [128], are functions of 48 inputs."""
    source, stats = statistics(num_key_value_heads=4, hidden_size=48)
    care_mla.convert(source, tmp_path / "out", stats=stats, kv_save=0.75)
    assert sizes == {128: LAYERS, 48: LAYERS * 2}


def test_of_a_plan(statistics: Callable[..., tuple[Path, Path]], sizes: Counter[int]) -> None:
    """G is shared by all budgets and recipes that are compared."""
    source, stats = statistics(hidden_size=96)
    forecasts = care_mla.plan_ranks(
        source, stats, kv_save=[0.2, 0.3, 0.4], recipes=[{"layout": "joint"}, {"layout": "mla"}]
    )
    chosen = [width for width, _ in groupby(f.recipe["qk_rope_head_dim"] for f in forecasts[3:])]
    once, joint, compared = 1, 1, 3 * 2
    assert sizes == {64: LAYERS * (once + joint + compared + len(chosen))}
