"""What a budget decides, see `config.policy`."""

from __future__ import annotations

import pytest

from care_mla.config.policy import LOW_BUDGET_FROM, Policy, policy


@pytest.mark.parametrize(
    ("kv_save", "predicts_loss", "can_refit", "expected"),
    [
        (0.5, True, True, Policy("fisher", 0.8, False)),
        (LOW_BUDGET_FROM, True, True, Policy("fisher", 0.5, True)),
        (0.75, True, False, Policy("fisher", 0.5, False)),
        (0.75, False, True, Policy("uniform", 0.5, False)),
    ],
)
def test_policy(kv_save: float, predicts_loss: bool, can_refit: bool, expected: Policy) -> None:
    assert policy(kv_save, predicts_loss=predicts_loss, can_refit=can_refit) == expected
