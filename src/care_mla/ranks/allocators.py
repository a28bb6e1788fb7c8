"""Allocators: spread a cache budget over layers, given the energies that truncation will drop."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from care_mla.errors import ConfigError, RankError
from care_mla.ranks.plan import Budget, RankPlan


@dataclass(frozen=True)
class Bounds:
    """Smallest and largest rank of one latent, and the step between allowed ranks."""

    least: int
    most: int
    multiple: int = 1


Energies = Sequence[Float[Tensor, "n"]]
Priority = Callable[[Float[Tensor, "n"], int, int], float]


def greedy(energies: Energies, budget: int, bounds: Bounds, priority: Priority) -> list[int]:
    """Start every layer at its minimum and give steps of `multiple` ranks to the largest priority until the budget is spent.

    Of equal priorities the smaller rank comes first: what no layer gains by (ranks beyond D of an MHA model) is spread evenly.

    Args:
        energies: per layer, descending.
        budget: sum of ranks allowed.
        priority: (energies, rank now, step) -> worth of the next step.

    Raises:
        RankError: the minimum alone exceeds the budget.
    """
    ranks = [bounds.least] * len(energies)
    left = budget - sum(ranks)
    if left < 0:
        raise RankError(
            f"the minimum rank {bounds.least} in {len(energies)} layers needs {sum(ranks)} elements, the budget is {budget}; lower --min-rank"
        )
    step = bounds.multiple
    heap = [
        (-priority(e, bounds.least, step), bounds.least, layer)
        for layer, e in enumerate(energies)
        if bounds.least + step <= bounds.most
    ]
    heapq.heapify(heap)
    while heap and left >= step:
        _, _, layer = heapq.heappop(heap)
        ranks[layer] += step
        left -= step
        if ranks[layer] + step <= bounds.most:
            heapq.heappush(heap, (-priority(energies[layer], ranks[layer], step), ranks[layer], layer))
    return ranks


def share_of_residual(energies: Float[Tensor, "n"], rank: int, step: int) -> float:
    """CARE Eq. 1: s_{r+1}^2 / sum_{m>r} s_m^2, summed over the next `step` ranks. 0 where nothing is left to explain."""
    residual = float(energies[rank:].sum())
    return float(energies[rank : rank + step].sum()) / residual if residual > 0 else 0.0


def uniform(energies: Sequence[Energies], budget: Budget, bounds: Bounds) -> list[list[int]]:
    """The same rank everywhere, rounded down to the multiple."""
    rank = int(budget.nominal_rank) // bounds.multiple * bounds.multiple
    if not bounds.least <= rank <= bounds.most:
        raise RankError(
            f"the budget of {budget.elements} cached elements gives every latent rank {rank} (in steps of {bounds.multiple}), "
            f"outside the bounds {bounds.least}..{bounds.most}"
        )
    return [[rank] * len(block) for block in energies]


def care(energies: Sequence[Energies], budget: Budget, bounds: Bounds) -> list[list[int]]:
    """CARE-E, Eq. 1: greedy by share of each layer's own residual, keys and values with budgets of their own."""
    return [greedy(block, budget.elements // budget.num_blocks, bounds, share_of_residual) for block in energies]


def lost_energy(energies: Float[Tensor, "n"], rank: int, step: int) -> float:
    """Energy that the next `step` ranks save."""
    return float(energies[rank : rank + step].sum())


def energy(energies: Sequence[Energies], budget: Budget, bounds: Bounds) -> list[list[int]]:
    """Minimize the sum of all dropped energies at the total budget, latents of all layers and blocks against each other.

    Exact: energies descend, so every latent's residual is convex in its rank and the greedy choice is optimal.
    """
    flat = [layer for block in energies for layer in block]
    ranks = greedy(flat, budget.elements, bounds, lost_energy)
    layers = budget.geometry.num_layers
    return [ranks[start : start + layers] for start in range(0, len(ranks), layers)]


ALLOCATORS: dict[str, Callable[[Sequence[Energies], Budget, Bounds], list[list[int]]]] = {
    "uniform": uniform,
    "care": care,
    "energy": energy,
    "fisher": energy,
}
"""name -> (energies [block][layer], budget, bounds) -> ranks [block][layer]. `energy` and `fisher` are one rule on the spectra
of different metrics: output energy (any method), predicted loss increase (method fisher alone)."""


def check_allocation(
    allocator: str, budget: Budget, *, min_rank: int | None = None, max_rank: int | None = None, multiple: int = 1
) -> Bounds:
    """Bounds of an allocation, the default ones (the paper's r/2..2r for allocated ranks) filled in.

    Raises:
        ConfigError: unknown allocator.
        RankError: bounds that cannot hold.
    """
    if allocator not in ALLOCATORS:
        raise ConfigError(f"unknown rank allocation {allocator!r}; choose one of {', '.join(ALLOCATORS)}")
    if multiple < 1:
        raise RankError(f"--rank-multiple is {multiple}; it must be at least 1")
    nominal = budget.nominal_rank
    least = min_rank if min_rank is not None else (multiple if allocator == "uniform" else max(int(nominal / 2), 1))
    most = (
        max_rank
        if max_rank is not None
        else (budget.width if allocator == "uniform" else min(int(2 * nominal), budget.width))
    )
    least = -(-least // multiple) * multiple
    if not 1 <= least <= most <= budget.width:
        raise RankError(
            f"rank bounds {least}..{most} (in steps of {multiple}) do not fit 1..{budget.width}, the width of one {budget.layout.name} latent"
        )
    return Bounds(least, most, multiple)


def allocate(
    allocator: str,
    energies: Sequence[Energies],
    budget: Budget,
    *,
    min_rank: int | None = None,
    max_rank: int | None = None,
    multiple: int = 1,
) -> RankPlan:
    """Spend a budget.

    Args:
        allocator: a name of `ALLOCATORS`.
        energies: [block][layer] descending energies of the spectra that will be truncated.

    Raises:
        ConfigError: unknown allocator.
        RankError: bounds or budget that cannot be met.
    """
    bounds = check_allocation(allocator, budget, min_rank=min_rank, max_rank=max_rank, multiple=multiple)
    by_block = ALLOCATORS[allocator]([[e.to(torch.float64) for e in block] for block in energies], budget, bounds)
    return RankPlan(budget.layout, tuple(zip(*by_block, strict=True)), budget.beside)
