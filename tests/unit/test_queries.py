"""Low-rank queries against the whitened SVD written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from care_mla.conversion.queries import query_factors, query_metric, relative_query_error
from care_mla.errors import RankError
from care_mla.linalg import PositiveMatrix, shrink_to_isotropic

GROUPS, HEADS, WIDTH, INPUT = 2, 4, 4, 6


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _problem() -> tuple[Tensor, Tensor, Tensor]:
    x, keys = _random(40, INPUT) @ _random(INPUT, INPUT, seed=1), _random(9, GROUPS, WIDTH, seed=2)
    metric = query_metric(torch.einsum("tgi,tgj->gij", keys, keys) / 9, HEADS)
    return _random(HEADS * WIDTH, INPUT, seed=3), x.T @ x / 40, metric


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_error_is_the_tail_of_the_whitened_singular_values(rank: int) -> None:
    W, C, K = _problem()
    factors = query_factors(W, C, K, rank, shrinkage=0.01)
    whitened = PositiveMatrix(K).power(0.5) @ W @ PositiveMatrix(shrink_to_isotropic(C, 0.01)).power(0.5)
    lost = W - factors.up @ factors.encode @ W
    error = torch.einsum("ij,jk,lk,li->", lost, shrink_to_isotropic(C, 0.01), lost, K)
    torch.testing.assert_close(error, torch.linalg.svdvals(whitened)[rank:].square().sum())


def test_full_rank_is_exact_and_errors_fall() -> None:
    W, C, K = _problem()
    factors = [query_factors(W, C, K, rank, shrinkage=0.01) for rank in range(1, INPUT + 1)]
    errors = [relative_query_error(each, W, C) for each in factors]
    assert errors == sorted(errors, reverse=True)
    torch.testing.assert_close(factors[-1].up @ (factors[-1].encode @ W), W)
    with pytest.raises(RankError):
        query_factors(W, C, K, 0, shrinkage=0.01)


def test_the_metric_holds_each_heads_keys_and_the_scale_of_its_norm() -> None:
    turned = torch.stack([torch.eye(WIDTH), 3.0 * torch.eye(WIDTH)]).double()
    scale = torch.arange(1.0, HEADS * WIDTH + 1).double()
    metric = query_metric(turned, HEADS, scale)
    plain = torch.diag(torch.cat([torch.ones(8), 3.0 * torch.ones(8)]).double() * scale.square())
    torch.testing.assert_close(metric, shrink_to_isotropic(plain, 0.02))
