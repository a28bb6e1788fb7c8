"""Streaming sums: any order, any split, padding ignored, weights exact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from care_mla.errors import CalibrationError
from care_mla.stats import Moments, StatisticsStore, StatisticsWriter

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(50, 5, generator=GENERATOR)
Y = torch.randn(50, 4, generator=GENERATOR)


def _collect(*rows: slice, weights: torch.Tensor | None = None) -> Moments:
    moments = Moments.zeros(4, 5, with_inputs=True)
    for row in rows:
        moments.update(X[row], Y[row], None if weights is None else weights[row])
    return moments


def _assert_same(one: Moments, other: Moments) -> None:
    for name, tensor in one.to_tensors().items():
        torch.testing.assert_close(tensor, other.to_tensors()[name], rtol=1e-12, atol=1e-12)


def test_equals_the_definition() -> None:
    moments = _collect(slice(None))
    y, x = Y.double(), X.double()
    torch.testing.assert_close(moments.second_moment, y.T @ y / 50)
    torch.testing.assert_close(moments.mean, y.mean(0))
    assert moments.mean_input_energy == pytest.approx(float(x.pow(2).sum(1).mean() / 5), rel=1e-6)
    torch.testing.assert_close(moments.input_second / 50, x.T @ x / 50)
    torch.testing.assert_close(moments.input_magnitude / 50, x.abs().mean(0), rtol=1e-6, atol=1e-6)


def test_batches_and_merge_order_do_not_matter() -> None:
    whole = _collect(slice(0, 50))
    _assert_same(whole, _collect(slice(0, 13), slice(13, 50)))
    a, b, c = _collect(slice(0, 10)), _collect(slice(10, 15)), _collect(slice(15, 50))
    _assert_same(whole, a.merge(b).merge(c))
    _assert_same(whole, c.merge(a.merge(b)))


def test_zero_weight_is_absence() -> None:
    weights = torch.ones(50)
    weights[30:] = 0
    _assert_same(_collect(slice(None), weights=weights), _collect(slice(0, 30)))


def test_weights_make_the_mixture_of_the_paper() -> None:
    """C_mix = 0.25 C_1 + 0.75 C_2 whatever the number of tokens (App. I.7)."""
    weights = torch.cat([torch.full((10,), 0.25 / 10), torch.full((40,), 0.75 / 40)])
    mixed = _collect(slice(None), weights=weights).second_moment
    parts = [_collect(slice(0, 10)).second_moment, _collect(slice(10, 50)).second_moment]
    torch.testing.assert_close(mixed, 0.25 * parts[0] + 0.75 * parts[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_is_refused(bad: float) -> None:
    broken = Y.clone()
    broken[3, 2] = bad
    with pytest.raises(CalibrationError, match="non-finite"):
        Moments.zeros(4, 5).update(X, broken)


def test_merging_unlike_moments_is_refused() -> None:
    with pytest.raises(CalibrationError, match="input_second"):
        _collect(slice(None)).merge(Moments.zeros(4, 5))


def test_store_round_trip_and_refusals(tmp_path: Path) -> None:
    writer = StatisticsWriter(tmp_path)
    writer.write_layer(0, _collect(slice(None)))
    writer.write_metadata({"source": "a", "source_fingerprint": "f" * 64})
    store = StatisticsStore(tmp_path)
    _assert_same(store.layer(0), _collect(slice(None)))
    store.require_source("f" * 64, "a")
    with pytest.raises(CalibrationError, match="another model"):
        store.require_source("0" * 64, "b")
    with pytest.raises(CalibrationError, match="layer 1 cannot be read"):
        store.layer(1)
    (tmp_path / "layer_0000.safetensors").write_bytes(b"broken")
    with pytest.raises(CalibrationError, match="layer 0 cannot be read"):
        store.layer(0)
    (tmp_path / "stats.json").write_text('{"format": "something else"}')
    with pytest.raises(CalibrationError, match="format 'something else'"):
        StatisticsStore(tmp_path)
    with pytest.raises(CalibrationError, match=r"no stats\.json"):
        StatisticsStore(tmp_path / "absent")
