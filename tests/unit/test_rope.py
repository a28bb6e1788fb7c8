"""Partial RoPE: complex algebra against rotations written out, and the selection against literal scores."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from care_mla.errors import RankError
from care_mla.layouts import AttentionWeights
from care_mla.layouts.mla import mla_tensors, position_free
from care_mla.linalg import decompose, truncate
from care_mla.rope import (
    Components,
    RotarySelection,
    complex_moment,
    components,
    dropped_rotation,
    half_split_heads,
    predicted_rotation_loss,
    real_map,
    select,
    turned_covariance,
)

HEADS, WIDTH, INPUT, QUERIES = 3, 8, 10, 6  # kv heads, head width, hidden size, query heads
FREQUENCIES = torch.tensor([1.0, 0.3, 0.05, 0.001], dtype=torch.float64)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _rotate(heads: Tensor, position: float) -> Tensor:
    """transformers' rotate_half on [..., g, d], as written there."""
    angle = (position * FREQUENCIES).repeat(2)
    first, second = heads.chunk(2, -1)
    return heads * angle.cos() + torch.cat([-second, first], -1) * angle.sin()


def test_a_rotation_multiplies_by_a_phase() -> None:
    x = _random(5, HEADS * WIDTH)
    turned = _rotate(x.view(5, HEADS, WIDTH), 7.0).flatten(1)
    expected = half_split_heads(x, WIDTH) * torch.exp(7j * FREQUENCIES)
    torch.testing.assert_close(half_split_heads(turned, WIDTH), expected)


def test_complex_moment_is_the_average_outer_product() -> None:
    x = _random(50, HEADS * WIDTH)
    z = half_split_heads(x, WIDTH)
    expected = torch.einsum("tgf,thf->fgh", z, z.conj()) / 50
    torch.testing.assert_close(complex_moment(x.T @ x / 50, WIDTH), expected)


def test_real_map_multiplies_every_frequency_and_commutes_with_rotation() -> None:
    maps = torch.complex(_random(4, HEADS, HEADS), _random(4, HEADS, HEADS, seed=1))
    x, matrix = _random(5, HEADS * WIDTH), real_map(maps, HEADS)
    expected = torch.einsum("fgh,thf->tgf", maps, half_split_heads(x, WIDTH))
    torch.testing.assert_close(half_split_heads(x @ matrix.T, WIDTH), expected)
    before = _rotate(x.view(5, HEADS, WIDTH), 3.0).flatten(1) @ matrix.T
    torch.testing.assert_close(before, _rotate((x @ matrix.T).view(5, HEADS, WIDTH), 3.0).flatten(1))


@pytest.fixture(params=[False, True], ids=["energy", "metric"])
def parts(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    keys, gradients = _random(90, HEADS * WIDTH), _random(90, HEADS * WIDTH, seed=1)
    metric = complex_moment(gradients.T @ gradients / 90, WIDTH) if request.param else None
    return components(complex_moment(keys.T @ keys / 90, WIDTH), metric)


def test_components_decode_what_they_encode(parts) -> None:  # type: ignore[no-untyped-def]
    identity = torch.eye(HEADS, dtype=torch.complex128).expand(4, -1, -1)
    torch.testing.assert_close(parts.decoder @ parts.encoder, identity)
    assert bool((parts.energies[:, :-1] >= parts.energies[:, 1:]).all())


def test_standing_still_costs_nothing_when_slow_and_two_when_fast() -> None:
    cost = dropped_rotation(torch.tensor([0.0, 1e-6, 2.5], dtype=torch.float64), 4096)
    assert cost[0] == 0 and cost[1] < 1e-4 and cost[2] == pytest.approx(2.0, abs=0.01)
    positions = torch.arange(50)
    distance = (positions[:, None] - positions)[torch.ones(50, 50).tril().bool()]
    literal = (torch.exp(1j * distance * 0.3) - 1).abs().square().mean()
    assert float(dropped_rotation(torch.tensor([0.3], dtype=torch.float64), 50)) == pytest.approx(float(literal))


def test_turned_covariance_is_that_of_keys_turned_by_every_distance() -> None:
    context, keys = 20, 0.5 + _random(30, HEADS * WIDTH)
    second, mean = keys.T @ keys / 30, keys.mean(0)
    turned = torch.stack([_rotate(keys.view(30, HEADS, WIDTH), -distance) for distance in range(context)])
    weight = (context - torch.arange(context, dtype=torch.float64)) / (30 * sum(range(context + 1)))
    about = turned - torch.einsum("d,dtgi->gi", weight, turned)
    expected = torch.einsum("d,dtgi,dtgj->gij", weight, about, about)
    torch.testing.assert_close(turned_covariance(second, mean, FREQUENCIES, context), expected)


def test_free_keeps_the_dearest_pairs_and_stock_one_of_each_frequency(parts) -> None:  # type: ignore[no-untyped-def]
    cost = dropped_rotation(FREQUENCIES, 100)
    price = parts.energies * cost[:, None]
    free = select(parts, cost, 5, HEADS, "free")
    assert torch.equal(
        torch.bincount(free.frequencies, minlength=4), (price >= price.flatten().sort().values[-5]).sum(1)
    )
    assert select(parts, cost, 4, HEADS, "stock").frequencies.tolist() == [0, 1, 2, 3]
    assert select(parts, cost, 2, HEADS, "stock").frequencies.tolist() == [0, 2]
    everything = select(parts, cost, 12, HEADS, "free")
    torch.testing.assert_close(everything.rest, torch.zeros(24, 24, dtype=torch.float64))


@pytest.mark.parametrize(("pairs", "mode"), [(13, "free"), (3, "stock"), (8, "stock"), (0, "stock")])
def test_impossible_widths(pairs: int, mode: str, parts) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RankError, match="--qk-rope-head-dim"):
        select(parts, dropped_rotation(FREQUENCIES, 100), pairs, HEADS, mode)


def _folded(keys: Tensor, fold: int) -> Components:
    moment = complex_moment(keys.T @ keys / len(keys), WIDTH, fold)
    return components(moment.real.to(moment.dtype))


def test_freq_fold_mixes_neighbours_and_turns_at_the_engine_frequencies() -> None:
    parts, cost = _folded(_random(90, HEADS * WIDTH), 2), dropped_rotation(FREQUENCIES, 100)
    assert parts.energies.shape == (2, 6)
    selection = select(parts, cost, 4, HEADS, "transmla")
    assert selection.frequencies.tolist() == [0, 1, 2, 3]
    assert selection.sources.tolist() == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert select(parts, cost, 2, HEADS, "transmla").frequencies.tolist() == [0, 2]
    with pytest.raises(RankError, match="--freq-fold"):
        select(parts, cost, 1, HEADS, "transmla")


def test_freq_fold_splits_keys_without_loss_and_concentrates_their_energy() -> None:
    """z = sum of kept components + rest; neighbours that say the same need one component for both."""
    keys = _random(90, HEADS * WIDTH)
    heads = keys.view(90, HEADS, 2, 2, 2)  # heads, real or imaginary, folds, fold
    heads[..., 1] = 0.5 * heads[..., 0]
    selection = select(_folded(keys, 2), dropped_rotation(FREQUENCIES, 100), 4, HEADS, "transmla")
    z = half_split_heads(keys, WIDTH)
    read = torch.einsum("pmg,tgpm->tp", selection.encoder, z[..., selection.sources])
    kept = torch.zeros_like(z)
    for pair, sources in enumerate(selection.sources.tolist()):
        for m, source in enumerate(sources):
            kept[..., source] += read[:, pair, None] * selection.decoder[pair, m]
    torch.testing.assert_close(kept + half_split_heads(keys @ selection.rest.T, WIDTH), z)
    single = _folded(keys, 1).energies
    assert _folded(keys, 2).energies[:, :2].sum() > single[:, 0].sum()


def _weights(**biases: Tensor) -> AttentionWeights:
    n = HEADS * WIDTH
    return AttentionWeights(
        _random(QUERIES * WIDTH, INPUT), _random(n, INPUT, seed=1), _random(n, INPUT, seed=2),
        _random(INPUT, QUERIES * WIDTH, seed=3), **biases,
    )  # fmt: skip


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("pairs", [0, 4, 12])
def test_scores_are_those_of_a_literal_edit(pairs: int, biased: bool, parts) -> None:  # type: ignore[no-untyped-def]
    """Kept components turn, the others stand still: against the keys split and rotated head by head."""
    n, rank = HEADS * WIDTH, 2 * HEADS * WIDTH
    biases = (
        {"q_bias": _random(QUERIES * WIDTH, seed=5), "k_bias": _random(n, seed=6), "v_bias": _random(n, seed=7)}
        if biased
        else {}
    )
    weights = _weights(**biases)
    selection = select(parts, dropped_rotation(FREQUENCIES, 100), pairs, HEADS)
    y = _random(99, rank, seed=4)
    both = position_free(selection)
    factors = truncate(decompose(both @ (y.T @ y) @ both.T + 1e-9 * torch.eye(rank, dtype=torch.float64)), rank)
    tensors = mla_tensors(weights, selection, factors, num_kv_heads=HEADS, head_dim=WIDTH)

    x_query, x_key, at_query, at_key = _random(INPUT, seed=8), _random(INPUT, seed=9), 11.0, 4.0
    none = torch.zeros(n, dtype=torch.float64)
    query = (weights.q @ x_query + biases.get("q_bias", torch.zeros(QUERIES * WIDTH).double())).view(QUERIES, WIDTH)
    key = weights.k @ x_key + biases.get("k_bias", none)
    rotary = key - selection.rest @ key
    static = selection.rest @ (weights.k @ x_key)  # its bias is the same for every key: softmax is blind to it
    group = torch.arange(QUERIES) // (QUERIES // HEADS)
    turned = _rotate(rotary.view(HEADS, WIDTH), at_key)[group]
    expected = (_rotate(query, at_query) * turned).sum(1) + (query * static.view(HEADS, WIDTH)[group]).sum(1)

    own = tensors["q_proj.weight"] @ x_query + tensors.get("q_proj.bias", torch.zeros(1).double())
    own = own.view(QUERIES, WIDTH + 2 * pairs)
    cached = tensors["kv_a_proj_with_mqa.weight"] @ x_key + tensors.get(
        "kv_a_proj_with_mqa.bias", torch.zeros(1).double()
    )
    rebuilt = (tensors["kv_b_proj.weight"] @ cached[:rank]).view(QUERIES, 2 * WIDTH)

    def turn(z: Tensor, position: float) -> Tensor:
        angle = (position * FREQUENCIES[selection.frequencies]).repeat(2)
        first, second = z.chunk(2, -1)
        return z * angle.cos() + torch.cat([-second, first], -1) * angle.sin()

    scores = (own[:, :WIDTH] * rebuilt[:, :WIDTH]).sum(1)
    scores = scores + (turn(own[:, WIDTH:], at_query) * turn(cached[rank:], at_key)).sum(1)
    torch.testing.assert_close(scores, expected)
    values = rebuilt[:, WIDTH:].flatten()
    out = weights.o @ values + tensors.get("o_proj.bias", torch.zeros(1).double())
    true = (weights.v @ x_key + biases.get("v_bias", none)).view(HEADS, WIDTH)[group].flatten()
    torch.testing.assert_close(out, weights.o @ true)


def test_predicted_rotation_loss_is_the_quadratic_form(parts) -> None:  # type: ignore[no-untyped-def]
    """Keys off by w (exp(i angle) - 1), gradients of random phase: E[(g^T e)^2] / 2 on many draws."""
    selection: RotarySelection = select(parts, dropped_rotation(FREQUENCIES, 100), 4, HEADS)
    keys, gradients = _random(200000, 24, seed=1), _random(200000, 24, seed=2) @ _random(24, 24, seed=3) * 0.1
    moment, curvature = keys.T @ keys / 200000, gradients.T @ gradients / 200000
    curvature = real_map(complex_moment(curvature, WIDTH), HEADS) / 2  # phases of gradients are uniform
    gradients = _random(200000, 24, seed=4) @ torch.linalg.cholesky(curvature).T
    lost = half_split_heads(keys @ selection.rest.T, WIDTH)
    positions = torch.randint(0, 100, (200000, 2), generator=torch.Generator().manual_seed(5))
    distance = (positions[:, 0] - positions[:, 1]).abs().double()
    off = lost * (torch.exp(1j * distance[:, None, None] * FREQUENCIES) - 1)
    projected = (half_split_heads(gradients, WIDTH).conj() * off).real.sum((1, 2))
    predicted = predicted_rotation_loss(selection, dropped_rotation(FREQUENCIES, 100), curvature, moment)
    assert predicted == pytest.approx(0.5 * float(projected.square().mean()), rel=0.05)
