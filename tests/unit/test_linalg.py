"""The factorization: exactness, optimality, and inputs that break careless code."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from care_mla.errors import ConfigError, NumericalError, RankError
from care_mla.linalg import PositiveMatrix, decompose, shrink, shrink_to_isotropic, truncate


def _orthogonal(n: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]


def _with_spectrum(values: list[float], seed: int = 0) -> Tensor:
    q = _orthogonal(len(values), seed)
    return (q * torch.tensor(values, dtype=torch.float64)) @ q.T


MOMENTS = {
    "well conditioned": _with_spectrum([8.0, 5.0, 3.0, 2.0, 1.0, 0.5]),
    "singular": _with_spectrum([4.0, 1.0, 0.0, 0.0, 0.0, 0.0]),
    "ill conditioned": _with_spectrum([1e8, 1e4, 1.0, 1e-4, 1e-8, 1e-12]),
    "repeated": _with_spectrum([3.0, 3.0, 3.0, 1.0, 1.0, 1.0]),
}


@pytest.fixture(params=MOMENTS)
def moment(request: pytest.FixtureRequest) -> Tensor:
    return MOMENTS[request.param]


@pytest.fixture(params=[False, True], ids=["identity metric", "metric"])
def metric(request: pytest.FixtureRequest) -> PositiveMatrix | None:
    return PositiveMatrix(_with_spectrum([5.0, 2.0, 1.0, 0.7, 0.1, 0.01], seed=3)) if request.param else None


def test_full_rank_is_the_identity(moment: Tensor, metric: PositiveMatrix | None) -> None:
    factors = truncate(decompose(moment, metric), 6)
    torch.testing.assert_close(factors.projector(), torch.eye(6, dtype=torch.float64), atol=1e-9, rtol=0)


def test_residual_is_the_measured_error_and_falls_with_rank(moment: Tensor, metric: PositiveMatrix | None) -> None:
    spectrum = decompose(moment, metric)
    weight = torch.eye(6, dtype=torch.float64) if metric is None else metric.matrix
    errors = []
    for rank in range(1, 7):
        lost = torch.eye(6, dtype=torch.float64) - truncate(spectrum, rank).projector()
        errors.append(float((weight @ lost @ moment @ lost.T).trace()))
        assert errors[-1] == pytest.approx(spectrum.residual(rank), abs=1e-9 * float(spectrum.energies[0]))
    assert all(late <= early + 1e-9 * float(spectrum.energies[0]) for early, late in pairwise(errors))


def test_no_other_projection_of_the_rank_is_better(metric: PositiveMatrix | None) -> None:
    moment, rank = MOMENTS["well conditioned"], 3
    spectrum = decompose(moment, metric)
    weight = torch.eye(6, dtype=torch.float64) if metric is None else metric.matrix
    for seed in range(20):
        basis = _orthogonal(6, seed)[:, :rank]
        # The best map onto a given output subspace under the metric, for these moments.
        projector = basis @ torch.linalg.solve(basis.T @ weight @ basis, basis.T @ weight)
        lost = torch.eye(6, dtype=torch.float64) - projector
        assert float((weight @ lost @ moment @ lost.T).trace()) >= spectrum.residual(rank) - 1e-9


def test_up_projection_is_orthonormal(moment: Tensor, metric: PositiveMatrix | None) -> None:
    factors = truncate(decompose(moment, metric), 4)
    torch.testing.assert_close(factors.up.T @ factors.up, torch.eye(4, dtype=torch.float64), atol=1e-10, rtol=0)


def test_scaling_the_metric_changes_nothing(moment: Tensor) -> None:
    metric = _with_spectrum([5.0, 2.0, 1.0, 0.7, 0.1, 0.01], seed=3)
    if float(torch.linalg.eigvalsh(moment).diff().min()) < 1e-9:
        pytest.skip("repeated energies leave the subspace undetermined")
    one, other = (truncate(decompose(moment, PositiveMatrix(s * metric)), 2).projector() for s in (1.0, 1e-10))
    torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("rank", [0, -1, 7])
def test_rank_out_of_range(rank: int) -> None:
    with pytest.raises(RankError, match=r"outside 1\.\.6"):
        truncate(decompose(MOMENTS["repeated"]), rank)


def test_singular_metric_names_the_directions() -> None:
    with pytest.raises(NumericalError, match="2 independent directions of 6"):
        decompose(MOMENTS["repeated"], PositiveMatrix(MOMENTS["singular"]))


def test_non_finite_moment() -> None:
    broken = MOMENTS["repeated"].clone()
    broken[2, 2] = float("nan")
    with pytest.raises(NumericalError, match="non-finite"):
        decompose(broken)


def test_shrinkage_cures_a_singular_metric() -> None:
    cured = shrink_to_isotropic(MOMENTS["singular"], 0.01)
    assert float(cured.trace()) == pytest.approx(float(MOMENTS["singular"].trace()))
    factors = truncate(decompose(MOMENTS["repeated"], PositiveMatrix(cured)), 6)
    torch.testing.assert_close(factors.projector(), torch.eye(6, dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize("amount", [-0.1, 1.5])
def test_shrinkage_out_of_range(amount: float) -> None:
    with pytest.raises(ConfigError, match=r"\[0, 1\]"):
        shrink(MOMENTS["repeated"], MOMENTS["repeated"], amount)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0, -0.5, -1.0])
def test_powers(exponent: float) -> None:
    matrix = MOMENTS["well conditioned"]
    power = PositiveMatrix(matrix).power(exponent)
    values = torch.linalg.eigvalsh(matrix) ** exponent
    torch.testing.assert_close(torch.linalg.eigvalsh(power), values.sort().values, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(power @ matrix, matrix @ power, atol=1e-9, rtol=0)


def test_tempering_keeps_the_eigenvectors() -> None:
    matrix = MOMENTS["well conditioned"]
    tempered = PositiveMatrix(matrix).tempered(0.5, scale=3.0)
    torch.testing.assert_close(tempered.matrix @ tempered.matrix, 9.0 * matrix, atol=1e-10, rtol=0)
    torch.testing.assert_close(tempered.power(-1.0) @ tempered.matrix, torch.eye(6, dtype=torch.float64))


def test_effective_rank() -> None:
    assert 1 < PositiveMatrix(MOMENTS["well conditioned"]).effective_rank < 6
    assert PositiveMatrix(torch.eye(8, dtype=torch.float64)).effective_rank == pytest.approx(8)
    assert PositiveMatrix(torch.ones(8, 8, dtype=torch.float64)).effective_rank == pytest.approx(1)


@pytest.mark.parametrize("inputs", [3, 4, 6, 9])
def test_outputs_of_few_inputs_are_decomposed_where_they_are(
    metric: PositiveMatrix | None, inputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values of MHA: the same spectrum and maps as with all of the outputs, from matrices of min(n, D)."""
    generator = torch.Generator().manual_seed(4)
    W = torch.randn(6, inputs, generator=generator, dtype=torch.float64)
    W[:, 0] = W[:, 1]  # not even of full rank
    moment = W @ torch.diag(torch.rand(inputs, generator=generator, dtype=torch.float64) + 0.1) @ W.T
    expected = decompose(moment, metric)
    sizes: list[int] = []
    eigh = torch.linalg.eigh
    if metric is not None:
        assert metric.eigenpairs  # they are known already
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: sizes.append(len(matrix)) or eigh(matrix))
    spectrum = decompose(moment, metric, outputs_of=W)
    assert max(sizes) == min(6, inputs)
    torch.testing.assert_close(spectrum.energies, expected.energies, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(spectrum.decoder @ spectrum.encoder, torch.eye(6, dtype=torch.float64))
    for rank in range(1, min(6, inputs)):
        ours, theirs = (truncate(s, rank).projector() @ W for s in (spectrum, expected))
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)
