"""What a cache budget decides where a recipe leaves it open, with the measurements behind it.

All numbers: SmolLM2-135M-Instruct, layout joint, calibrated on C4, held-out text, loss increase as a fraction of CARE-U's on
WikiText-2 / C4 / Alpaca; docs/results/metric.md has the tables.

- Exponent p of the Fisher metric G^p. At 50% saving p = .5 gives .080 / .128 (C4 at 512, wiki at 2048 tokens), p = .65 .082 / .096,
  p = .8 .076 / .084. From 75% on the quadratic model of the loss breaks and p = .5 was best.
- Refit of output projections. At 50% it costs (.116 / .080 / .074 without, .131 / .086 / .080 with), at 62.5% it is even, at 75% it
  pays (.444 / .384 / .406 without, .393 / .284 / .347 with).
- Ranks. Where the loss is predicted, dropped energies of all layers are on one scale and one greedy pass over them is best;
  elsewhere equal ranks, the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass

LOW_BUDGET_FROM = 0.65
"""KV saving from which the quadratic model of the loss is trusted less and output projections are refitted."""
EXPONENT = 0.8
LOW_BUDGET_EXPONENT = 0.5


@dataclass(frozen=True)
class Policy:
    """What is best at one budget.

    Attributes:
        ranks: allocator, a name of `ranks.ALLOCATORS`.
        fisher_exponent: p of G^p.
        refit: whether output projections are refitted to the original's activations.
    """

    ranks: str
    fisher_exponent: float
    refit: bool


def policy(kv_save: float, *, predicts_loss: bool, can_refit: bool) -> Policy:
    """What is best at a saving.

    Args:
        kv_save: share of the cache that is saved.
        predicts_loss: whether the method knows what an error costs the loss.
        can_refit: whether the layout's output projections can be refitted.
    """
    low = kv_save >= LOW_BUDGET_FROM
    return Policy(
        ranks="fisher" if predicts_loss else "uniform",
        fisher_exponent=LOW_BUDGET_EXPONENT if low else EXPONENT,
        refit=predicts_loss and low and can_refit,
    )
