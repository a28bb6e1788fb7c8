"""Budgets and allocators: exact, within bounds, equal to the paper's greedy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from care_mla.errors import ConfigError, RankError
from care_mla.geometry import Geometry
from care_mla.layouts import JOINT, SPLIT, get_layout
from care_mla.ranks import allocate, make_budget

GEOMETRY = Geometry(num_layers=4, hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8)  # n = 16, cache 128


def _energies(layers: int, width: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    decay = torch.linspace(0.1, 1.0, layers)
    return [
        torch.exp(-decay[i] * torch.arange(width)).double() * (1 + torch.rand(1, generator=generator))
        for i in range(layers)
    ]


def test_three_ways_to_name_a_budget_agree() -> None:
    budgets = [
        make_budget(GEOMETRY, JOINT, **{k: v}) for k, v in (("rank", 8), ("kv_save", 0.5), ("cache_elements", 64))
    ]
    assert {budget.elements for budget in budgets} == {64}
    assert [make_budget(GEOMETRY, layout, rank=8).nominal_rank for layout in (SPLIT, JOINT)] == [8, 16]


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"rank": 4, "kv_save": 0.5},
        {"rank": 0},
        {"rank": 17},
        {"kv_save": 1.0},
        {"kv_save": -0.1},
        {"kv_save": float("nan")},
        {"cache_elements": 3},
        {"cache_elements": 129},
    ],
)
def test_bad_budgets(given: dict[str, float]) -> None:
    with pytest.raises(RankError):
        make_budget(GEOMETRY, SPLIT, **given)


@pytest.mark.parametrize("kv_save", [0.0, 0.1, 0.33, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("layout", ["split", "joint"])
@pytest.mark.parametrize("allocator", ["uniform", "care"])
def test_budget_is_never_exceeded_and_nearly_spent(allocator: str, layout: str, kv_save: float) -> None:
    budget = make_budget(GEOMETRY, get_layout(layout), kv_save=kv_save)
    energies = [_energies(4, budget.width, seed) for seed in range(budget.num_blocks)]
    plan = allocate(allocator, energies, budget)
    assert plan.cache_elements_per_token <= budget.elements
    slack = budget.num_blocks * (GEOMETRY.num_layers if allocator == "uniform" else 1)
    assert plan.cache_elements_per_token > budget.elements - slack
    assert plan.kv_save(GEOMETRY) >= kv_save - 1e-9
    assert all(1 <= rank <= budget.width for layer in plan.ranks for rank in layer)


def test_eq_1_step_by_step() -> None:
    """Against a direct transcription of Eq. 1, one rank at a time, bounds r/2..2r, K and V apart."""
    budget = make_budget(GEOMETRY, SPLIT, rank=5)
    energies = [_energies(4, 16, seed) for seed in (0, 1)]
    expected = []
    for block in energies:
        ranks = [2] * 4
        for _ in range(20 - 8):
            scores = [float(e[r] / e[r:].sum()) if r < 10 else -1.0 for e, r in zip(block, ranks, strict=True)]
            ranks[scores.index(max(scores))] += 1
        expected.append(ranks)
    assert allocate("care", energies, budget).ranks == tuple(zip(*expected, strict=True))


def test_eq_1_prefers_fast_decay() -> None:
    """The paper's fault, kept faithfully: a share of the own residual favours layers that need rank least."""
    budget = make_budget(GEOMETRY, JOINT, rank=5)
    ranks = [layer[0] for layer in allocate("care", [_energies(4, 32)], budget).ranks]
    assert ranks == sorted(ranks) and ranks[0] < ranks[-1]


def test_multiples_and_bounds() -> None:
    budget = make_budget(GEOMETRY, JOINT, kv_save=0.45)
    plan = allocate("care", [_energies(4, 32)], budget, multiple=4, min_rank=8, max_rank=24)
    assert all(rank % 4 == 0 and 8 <= rank <= 24 for (rank,) in plan.ranks)
    assert allocate("uniform", [_energies(4, 32)], budget, multiple=8).ranks == ((16,),) * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_rank": 20}, "lower --min-rank"),
        ({"min_rank": 9, "max_rank": 8}, "rank bounds"),
        ({"max_rank": 33}, "rank bounds"),
        ({"multiple": 0}, "--rank-multiple"),
    ],
)
def test_impossible_bounds(options: dict[str, int], message: str) -> None:
    with pytest.raises(RankError, match=message):
        allocate("care", [_energies(4, 32)], make_budget(GEOMETRY, JOINT, kv_save=0.5), **options)


def test_nothing_left_to_explain_is_no_division_by_zero() -> None:
    flat = [torch.zeros(32, dtype=torch.float64)] * 4
    assert allocate("care", [flat], make_budget(GEOMETRY, JOINT, kv_save=0.5)).ranks == ((16,),) * 4


def test_unknown_allocator() -> None:
    with pytest.raises(ConfigError, match="uniform, care, energy, fisher"):
        allocate("magic", [_energies(4, 32)], make_budget(GEOMETRY, JOINT, kv_save=0.5))
