"""Methods against the literal formulas of their papers (inputs X, D x D matrices, inverses, SVD). Products compared, never vectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from care_mla.errors import CalibrationError, ConfigError
from care_mla.linalg import decompose, truncate
from care_mla.methods import METHODS, Weighting, get_method
from care_mla.stats import FisherMoments, LayerStatistics, Moments

D, M, TOKENS = 12, 8, 40


def _inputs(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, D, generator=generator, dtype=torch.float64)
    if kind == "outliers":
        x[:, 0] *= 100
    if kind == "fewer tokens than directions":
        x = x[:6]
    if kind == "small":
        x *= 1e-4
    return x


INPUTS = ["plain", "outliers", "fewer tokens than directions", "small"]
W = torch.randn(M, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def _moments(x: Tensor) -> Moments:
    moments = Moments.zeros(M, D, with_inputs=True)
    moments.update(x, x @ W.T)
    return moments


def _ours(name: str, x: Tensor, rank: int, shrinkage: float = 0.01) -> Tensor:
    metric = METHODS[name].metric(LayerStatistics(_moments(x)), W, Weighting(shrinkage))
    return truncate(decompose(metric.second_moment, metric.output_metric), rank).projector() @ W


def _shrunk(x: Tensor, shrinkage: float = 0.01) -> Tensor:
    C = x.T @ x / len(x)
    return (1 - shrinkage) * C + shrinkage * C.diagonal().mean() * torch.eye(D, dtype=torch.float64)


def _truncated_svd(matrix: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def _symmetric_sqrt(C: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(C)
    return (vectors * values.sqrt()) @ vectors.T


def _literal_care(x: Tensor, rank: int) -> Tensor:
    """Eq. 3-4: sqrt(C) W = U S V^T, W^a = sqrt(C)^-1 U_r S_r, W^b = V_r^T; W of the paper is ours transposed."""
    root = _symmetric_sqrt(_shrunk(x))
    return (torch.linalg.inv(root) @ _truncated_svd(root @ W.T, rank)).T


def _literal_svd_llm(x: Tensor, rank: int) -> Tensor:
    L = torch.linalg.cholesky(_shrunk(x))
    return _truncated_svd(W @ L, rank) @ torch.linalg.inv(L)


def _literal_care_c(x: Tensor, rank: int) -> Tensor:
    C = _shrunk(x)
    return (torch.linalg.inv(C) @ _truncated_svd(C @ W.T, rank)).T


def _literal_asvd(x: Tensor, rank: int) -> Tensor:
    squared = x.abs().mean(0)  # alpha = 1/2
    squared = (0.99 * squared + 0.01 * squared.mean()).sqrt()
    return _truncated_svd(W * squared, rank) / squared


def _literal_svd(x: Tensor, rank: int) -> Tensor:
    return _truncated_svd(W, rank)


LITERAL: dict[str, Callable[[Tensor, int], Tensor]] = {
    "svd": _literal_svd,
    "asvd": _literal_asvd,
    "svd_llm": _literal_svd_llm,
    "care": _literal_care,
    "care_c": _literal_care_c,
}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("rank", [1, 3, 7, 8])
@pytest.mark.parametrize("name", LITERAL)
def test_equals_the_literal_formula(name: str, rank: int, kind: str) -> None:
    x = _inputs(kind)
    torch.testing.assert_close(_ours(name, x, rank), LITERAL[name](x, rank), atol=1e-8, rtol=0)


@pytest.mark.parametrize("kind", INPUTS)
def test_care_is_svd_llm(kind: str) -> None:
    x = _inputs(kind)
    torch.testing.assert_close(_ours("care", x, 3), _literal_svd_llm(x, 3), atol=1e-8, rtol=0)
    torch.testing.assert_close(_ours("care", x, 3), _ours("svd_llm", x, 3), atol=0, rtol=0)


def test_full_shrinkage_is_plain_svd() -> None:
    x = _inputs("outliers")
    torch.testing.assert_close(_ours("care", x, 4, shrinkage=1.0), _ours("svd", x, 4), atol=1e-8, rtol=0)


def test_care_has_the_least_activation_error_of_all() -> None:
    x = _inputs("outliers")
    errors = {name: float(((_ours(name, x, 3, 0.0) - W) @ x.T).pow(2).sum()) for name in LITERAL if name != "svd_llm"}
    assert min(errors, key=errors.__getitem__) == "care", errors


def test_care_c_without_inputs_says_what_to_do() -> None:
    moments = Moments.zeros(M, D)
    moments.update(_inputs("plain"), _inputs("plain") @ W.T)
    with pytest.raises(CalibrationError, match="--inputs"):
        METHODS["care_c"].metric(LayerStatistics(moments), W, Weighting())


def test_unknown_method_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="care"):
        get_method("magic")


def test_balanced_pca_is_pca_after_equalizing_energies() -> None:
    """Against TransMLA's words: scale keys so that both halves have one energy, joint PCA, scale back."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(80, 12, generator=generator, dtype=torch.float64)
    scales = torch.tensor([5.0] * 4 + [0.3] * 4, dtype=torch.float64)
    W = torch.randn(8, 12, generator=generator, dtype=torch.float64) * scales[:, None]
    Y = X @ W.T
    moments = Moments.zeros(8, 12)
    moments.update(X, Y)
    metric = METHODS["balanced_pca"].metric(LayerStatistics(moments), W, Weighting(shrinkage=0.0))
    product = truncate(decompose(metric.second_moment, metric.output_metric), 3).projector()
    balance = torch.cat([Y[:, :4].norm().expand(4), Y[:, 4:].norm().expand(4)])
    vectors = torch.linalg.svd(Y / balance, full_matrices=False).Vh[:3]
    torch.testing.assert_close(product, (vectors.T @ vectors) * balance[:, None] / balance)


@pytest.mark.parametrize("name", METHODS)
def test_options_of_a_method_are_those_that_change_it(name: str) -> None:
    """Every option of `Weighting`, one at a time: it changes the metric exactly where the method says so."""
    x = _inputs("outliers")
    fisher = FisherMoments.zeros(M)
    fisher.update(x @ W.T + 1.0, (x**2)[:, :M] + x[:, :M], torch.eye(M, dtype=torch.float64))
    statistics = LayerStatistics(_moments(x), fisher)
    changed = {"shrinkage": 0.1, "fisher_exponent": 0.9, "fisher_shrinkage": 0.2, "centre": False}
    assert set(changed) == {field.name for field in fields(Weighting)}
    before = METHODS[name].metric(statistics, W, Weighting())
    for option, value in changed.items():
        after = METHODS[name].metric(statistics, W, replace(Weighting(), **{option: value}))
        same = torch.allclose(after.second_moment, before.second_moment) and (after.mean is None) == (
            before.mean is None
        )
        if before.output_metric is not None:
            same = same and torch.allclose(after.output_metric.matrix, before.output_metric.matrix)
        assert same == (option not in METHODS[name].options), option


def test_baselines_are_marked() -> None:
    assert {name for name, method in METHODS.items() if not method.baseline} == {"fisher", "care"}
