"""Linearized QK-norm: the regression, and the statistics it is fitted to against tensors kept whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import byte_tokenizer, tiny_model
from torch import Tensor

import care_mla
from care_mla.calibration import Collected, collect_fisher, collect_moments
from care_mla.calibration.labels import label_variates, sampled_gradient
from care_mla.conversion.linear_norms import (
    affine_fit,
    constant_norm,
    linearization_error,
    linearized_attention,
    linearized_statistics,
)
from care_mla.errors import CalibrationError, ConfigError
from care_mla.families import get_family
from care_mla.layouts import AttentionWeights
from care_mla.stats import CrossMoments, FisherMoments, LayerStatistics, Moments, NormalizedStatistics
from care_mla.stats.normalized import with_constant
from care_mla.text import make_windows

X = 0.3 + torch.randn(200, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _cross(targets: Tensor, weight: Tensor | None = None) -> CrossMoments:
    moments = CrossMoments.zeros(7, targets.shape[1])
    moments.update(with_constant(X), targets, torch.ones(200).double() if weight is None else weight)
    return moments


def _normalized(W: Tensor, norm: Tensor) -> Tensor:
    heads = (X @ W.T).view(200, -1, len(norm))
    return (heads * heads.square().mean(-1, keepdim=True).rsqrt() * norm).flatten(1)


def test_an_affine_target_is_found_whatever_the_prior() -> None:
    A, c = _random(8, 6, seed=1), _random(8, seed=2)
    moments = _cross(X @ A.T + c)
    weight, bias = affine_fit(torch.zeros(8, 7).double(), moments, ridge=1e-12)
    torch.testing.assert_close(weight, A)
    torch.testing.assert_close(bias, c)
    assert linearization_error(weight, bias, moments) < 1e-9
    plain, none = affine_fit(torch.zeros(8, 7).double(), moments, ridge=1e-12, constant=False)
    assert none is None and linearization_error(plain, None, moments) > 1e-3


def test_the_fit_is_least_squares_between_the_prior_and_the_data() -> None:
    W, norm = _random(8, 6, seed=1), 0.5 + torch.rand(4, generator=torch.Generator().manual_seed(2)).double()
    moments = _cross(_normalized(W, norm))
    prior = constant_norm(W, None, norm, moments)
    heads = (X @ W.T).view(200, 2, 4)
    expected = heads / heads.square().mean((0, 2), keepdim=True).sqrt() * norm
    torch.testing.assert_close(with_constant(X) @ prior.T, expected.flatten(1))
    errors = [linearization_error(*affine_fit(prior, moments, ridge=ridge), moments) for ridge in (1e-9, 0.01, 1e9)]
    assert errors == sorted(errors)
    assert errors[2] <= linearization_error(prior[:, :-1], None, moments) + 1e-9


def test_statistics_are_those_of_the_linear_outputs() -> None:
    weight = torch.rand(200, generator=torch.Generator().manual_seed(5)).double()
    source = AttentionWeights(
        _random(8, 6, seed=1), _random(4, 6, seed=2), _random(4, 6, seed=3), _random(6, 8, seed=4),
        q_norm=torch.ones(4).double(), k_norm=torch.ones(4).double(),
    )  # fmt: skip
    normalized = NormalizedStatistics(
        _cross(_normalized(source.q, source.q_norm)), _cross(_normalized(source.k, source.k_norm), weight)
    )
    linear = linearized_attention(source, normalized)
    assert linear.q_norm is None and linear.k_norm is None and linear.k_bias is not None
    collected = Moments.zeros(8, 6, with_inputs=True)
    collected.update(X, X @ linear.keys_and_values.T)
    found = linearized_statistics(linear, normalized, LayerStatistics(collected))
    for name, tensor in collected.to_tensors().items():
        torch.testing.assert_close(found.moments.to_tensors()[name], tensor)
    assert found.fisher is None


@pytest.mark.parametrize("name", ["qwen3", "qwen3-mqa-bias"])
@pytest.mark.parametrize("padded", [False, True])
def test_collected_sums_equal_autograd(name: str, padded: bool, tmp_path: Path) -> None:
    """Against a plain backward pass from which x, the norms' outputs and the gradients there are kept whole."""
    model, path = tiny_model(name), tmp_path / "d.jsonl"
    path.write_text("\n".join(f'{{"text": "{chr(97 + i) * (6 + 3 * i * padded)} words and more"}}' for i in range(4)))
    windows = make_windows(str(path), byte_tokenizer(), samples=4, seqlen=20, seed=0, pack=False)
    family = get_family(model.config.to_dict())
    both, keys_alone, forward_only = Collected(), Collected(), Collected()
    collect_fisher(model, family, windows, both, seed=7, batch_size=4, normalized=True)
    collect_fisher(model, family, windows, keys_alone, seed=7, batch_size=4, normalized_keys=True)
    found, fisher = both.normalized[1], both.normalized_fisher[1]
    collect_moments(model, family, windows, forward_only, batch_size=2, normalized=True)
    plain = forward_only.normalized[1]

    seen: dict[str, Tensor] = {}
    for part in ("q_norm", "k_norm", "v_proj"):

        def keep(module: Any, inputs: Any, output: Tensor, part: str = part) -> None:
            output.retain_grad()
            seen.update({part: output, "x": inputs[0]})

        model.model.layers[1].self_attn.get_submodule(part).register_forward_hook(keep)
    (batch,) = windows.batches(4)
    counted = batch.attention_mask.bool()
    logits = model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    logits.backward(sampled_gradient(logits, counted, label_variates(4, 20, seed=7)))
    v_bias = model.model.layers[1].self_attn.v_proj.bias
    x, q, k, v = (seen[part].detach().flatten(2)[counted] for part in ("x", "q_norm", "k_norm", "v_proj"))
    v = v if v_bias is None else v - v_bias.detach()
    g = torch.cat([seen[part].grad.flatten(2)[counted] for part in ("k_norm", "v_proj")], dim=1)
    y, x1, ones = torch.cat([k, v], dim=1), with_constant(x), torch.ones(len(x))
    expected = NormalizedStatistics(*(CrossMoments.zeros(x1.shape[1], width) for width in (q.shape[1], k.shape[1])))
    expected_fisher = FisherMoments.zeros(y.shape[1])
    expected.queries.update(x1, q, ones)
    expected.keys.update(x1, k, g.norm(dim=1))
    expected_fisher.update(y, g, FisherMoments.leverage_metric(y.double().T @ y.double() / len(y)))
    for key, tensor in expected.to_tensors().items():
        torch.testing.assert_close(found.to_tensors()[key], tensor, rtol=1e-3, atol=1e-4)
    for key, tensor in expected_fisher.to_tensors().items():
        torch.testing.assert_close(fisher.to_tensors()[key], tensor, rtol=1e-3, atol=1e-4)
        assert torch.equal(keys_alone.normalized_fisher[1].to_tensors()[key], fisher.to_tensors()[key])
    forward = CrossMoments.zeros(x1.shape[1], k.shape[1])
    forward.update(x1, k, ones)
    for key, tensor in forward.to_tensors().items():
        torch.testing.assert_close(plain.keys.to_tensors()[key], tensor, rtol=1e-3, atol=1e-4)
    copy = NormalizedStatistics.from_tensors(found.to_tensors())
    assert all(torch.equal(copy.to_tensors()[key], tensor) for key, tensor in found.to_tensors().items())


def test_statistics_without_gradients_at_the_normalized_keys(
    tiny: Callable[..., Path], tmp_path: Path, text_file: Path
) -> None:
    text = {"calibration": str(text_file), "samples": 4, "seqlen": 48}
    stats = care_mla.calibrate(tiny("qwen3"), tmp_path / "stats", fisher=True, **text)
    for file in stats.glob("normalized_fisher_*"):
        file.unlink()
    recipe = {"stats": stats, "kv_save": 0.5}
    care_mla.convert(tiny("qwen3"), tmp_path / "joint", **recipe)
    care_mla.convert(tiny("qwen3"), tmp_path / "care", method="care", layout="mla", ranks="uniform", **recipe)
    with pytest.raises(CalibrationError, match="of normalized keys"):
        care_mla.convert(tiny("qwen3"), tmp_path / "mla", layout="mla", **recipe)
    assert not (tmp_path / "mla").exists()


def test_what_linear_needs(tiny: Callable[..., Path], tmp_path: Path, text_file: Path) -> None:
    text, out = {"calibration": str(text_file), "samples": 4, "seqlen": 48}, tmp_path / "out"
    for name, layout, message in (
        ("llama", "mla", "linear needs a model with QK-norm"),
        ("qwen3", "joint", "does not apply to --layout joint"),
    ):
        with pytest.raises(ConfigError, match=f"--qk-norm {message}"):
            care_mla.convert(tiny(name), out, calibration=text, kv_save=0.5, layout=layout, qk_norm="linear")
    with pytest.raises(ConfigError, match="--qk-norm 'none'"):
        care_mla.convert(tiny("qwen3"), out, calibration=text, kv_save=0.5, layout="mla", qk_norm="none")
    with pytest.raises(ConfigError, match="--normalized"):
        care_mla.calibrate(tiny("llama"), tmp_path / "none", normalized=True, **text)
    with pytest.raises(ConfigError, match="--normalized serves layout mla.*RoPE by layer type"):
        care_mla.calibrate(tiny("gemma3"), tmp_path / "none", normalized=True, fisher=True, **text)
    source = tiny("qwen3")
    recipe = {"kv_save": 0.5, "layout": "mla", "qk_norm": "linear"}
    stats = care_mla.calibrate(source, tmp_path / "stats", fisher=True, **text)
    with pytest.raises(CalibrationError, match="care calibrate --normalized"):
        care_mla.convert(source, out, stats=stats, **recipe)
    stats = care_mla.calibrate(source, tmp_path / "forward", fisher=False, normalized=True, **text)
    with pytest.raises(CalibrationError, match="without --no-fisher"):
        care_mla.convert(source, out, stats=stats, **recipe)
    assert not out.exists()
    manifest = care_mla.convert(source, out, stats=stats, method="care", ranks="uniform", **recipe)
    assert all(0 < layer["norm_error"][part] < 1 for layer in manifest["layers"] for part in ("q", "k"))
