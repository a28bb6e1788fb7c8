"""The Fisher metric: statistics equal autograd's, the factorization is optimal for them, ranks are spent exactly."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import byte_tokenizer, tiny_model

import care_mla
from care_mla.calibration import Collected, collect_fisher, collect_moments
from care_mla.calibration.labels import draw_labels, label_variates, sampled_gradient
from care_mla.errors import CalibrationError, ConfigError, NumericalError
from care_mla.families import get_family
from care_mla.geometry import Geometry
from care_mla.layouts import (
    JOINT,
    AttentionWeights,
    LatentContent,
    get_layout,
    predicted_loss_increase,
    reconstruction_error,
)
from care_mla.linalg import decompose, truncate
from care_mla.methods import METHODS, Weighting
from care_mla.ranks import allocate, make_budget
from care_mla.stats import FisherMoments, LayerStatistics, Moments
from care_mla.text import make_windows

X = torch.randn(60, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
W = torch.randn(8, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = X @ W.T + 3.0 * torch.randn(8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
G = torch.randn(60, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * torch.linspace(0.1, 2, 8)


def _statistics(rows: slice = slice(None), weights: torch.Tensor | None = None) -> LayerStatistics:
    moments, fisher = Moments.zeros(8, 12), FisherMoments.zeros(8)
    moments.update(X[rows], Y[rows], weights)
    fisher.update(Y[rows], G[rows], FisherMoments.leverage_metric(moments.second_moment), weights)
    return LayerStatistics(moments, fisher)


def test_statistics_equal_their_definition() -> None:
    fisher = _statistics().fisher
    norms = G.norm(dim=1)
    M = Y.T @ Y / 60
    M = 0.98 * M + 0.02 * M.diagonal().mean() * torch.eye(8, dtype=torch.float64)
    leverage = torch.einsum("ti,ij,tj->t", Y, torch.linalg.inv(M), Y)
    torch.testing.assert_close(fisher.mean, norms @ Y / norms.sum())
    torch.testing.assert_close(fisher.second_moment, torch.einsum("t,ti,tj->ij", norms, Y, Y) / norms.sum())
    torch.testing.assert_close(fisher.metric, torch.einsum("t,ti,tj->ij", leverage, G, G) / leverage.sum())


def test_batches_add_and_merge() -> None:
    whole, first, second = FisherMoments.zeros(8), FisherMoments.zeros(8), FisherMoments.zeros(8)
    M = FisherMoments.leverage_metric(Y.T @ Y / 60)
    whole.update(Y, G, M)
    first.update(Y[:20], G[:20], M)
    second.update(Y[20:], G[20:], M)
    for name, tensor in second.merge(first).to_tensors().items():
        torch.testing.assert_close(tensor, whole.to_tensors()[name])


@pytest.mark.parametrize(
    ("bad", "message"), [(0.0, "all zero"), (float("nan"), "non-finite"), (float("inf"), "non-finite")]
)
def test_useless_gradients_are_refused(bad: float, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        FisherMoments.zeros(8).update(Y, torch.full_like(G, bad), torch.eye(8, dtype=torch.float64))


def test_a_direction_without_gradient_is_dropped_first() -> None:
    """Largest in output energy, worthless to the loss: care keeps it, fisher does not."""
    y, g = Y - Y.mean(0), G.clone()
    y[:, 0] *= 50
    g[:, 0] = 0
    moments, fisher = Moments.zeros(8, 12), FisherMoments.zeros(8)
    moments.update(X, y)
    fisher.update(y, g, FisherMoments.leverage_metric(moments.second_moment))
    kept = {}
    for name in ("care", "fisher"):
        metric = METHODS[name].metric(LayerStatistics(moments, fisher), 1e-3 * W, Weighting(1e-6, 1.0, 1e-8))
        kept[name] = float(truncate(decompose(metric.second_moment, metric.output_metric), 3).projector()[0, 0])
    assert kept["care"] > 0.9 and abs(kept["fisher"]) < 0.1


def test_zero_exponent_is_centred_pca_of_the_weighted_outputs() -> None:
    metric = METHODS["fisher"].metric(_statistics(), W, Weighting(0.0, 0.0))
    plain = decompose(metric.second_moment)
    tempered = decompose(metric.second_moment, metric.output_metric)
    torch.testing.assert_close(truncate(tempered, 3).projector(), truncate(plain, 3).projector(), atol=1e-8, rtol=0)


def test_centring_keeps_the_mean_whatever_the_rank() -> None:
    """y' = mu + P (y - mu): the rebuilt mean is the mean, with and without biases of the source."""
    statistics = _statistics()
    metric = METHODS["fisher"].metric(statistics, W, Weighting())
    factors = [truncate(decompose(metric.second_moment, metric.output_metric), 2)]
    bias, none = torch.arange(4.0, dtype=torch.float64), torch.zeros(0, W.shape[1], dtype=W.dtype)
    geometry = Geometry(num_layers=1, hidden_size=W.shape[1], num_heads=1, num_kv_heads=1, head_dim=4)
    for k_bias in (None, bias):
        weights = AttentionWeights(none, W[:4], W[4:], none.T, k_bias=k_bias)
        tensors = JOINT.tensors(weights, factors, LatentContent(), metric.mean, geometry)
        latent = factors[0].encode @ metric.mean
        keys = tensors["k_b_proj.weight"] @ latent + tensors["k_b_proj.bias"]
        values = tensors["v_b_proj.weight"] @ latent + tensors["v_b_proj.bias"]
        expected = metric.mean.clone()
        expected[:4] += 0 if k_bias is None else k_bias
        torch.testing.assert_close(torch.cat([keys, values]), expected)


def test_fisher_without_statistics_names_care() -> None:
    with pytest.raises(CalibrationError, match="--method care"):
        METHODS["fisher"].metric(LayerStatistics(_statistics().moments), W, Weighting())


@pytest.mark.parametrize("multiple", [1, 2])
@pytest.mark.parametrize("layout", ["joint", "split"])
def test_energy_allocation_is_optimal(layout: str, multiple: int) -> None:
    """Against brute force over all plans within bounds."""
    geometry = Geometry(
        num_layers=3 if layout == "joint" else 2, hidden_size=8, num_heads=2, num_kv_heads=2, head_dim=2
    )
    budget = make_budget(geometry, get_layout(layout), kv_save=0.5)
    generator = torch.Generator().manual_seed(4)
    energies = [
        [
            torch.rand(budget.width, generator=generator, dtype=torch.float64).sort(descending=True).values
            for _ in range(geometry.num_layers)
        ]
        for _ in range(budget.num_blocks)
    ]
    bounds = {"min_rank": multiple, "max_rank": budget.width, "multiple": multiple}
    plan = allocate("energy", energies, budget, **bounds)

    def lost(ranks: tuple[int, ...]) -> float:
        flat = [layer for block in energies for layer in block]
        return sum(float(e[r:].sum()) for e, r in zip(flat, ranks, strict=True))

    count = budget.num_blocks * geometry.num_layers
    choices = range(multiple, budget.width + 1, multiple)
    best = min(lost(p) for p in itertools.product(choices, repeat=count) if sum(p) <= budget.elements)
    chosen = tuple(
        plan.ranks[layer][block] for block in range(budget.num_blocks) for layer in range(geometry.num_layers)
    )
    assert plan.cache_elements_per_token <= budget.elements and lost(chosen) == pytest.approx(best)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("padded", [False, True])
def test_collected_gradients_equal_autograd(name: str, padded: bool, tmp_path: Path) -> None:
    """Two sweeps, layers run again, hooks and masks change nothing: against a plain backward pass without any of them."""
    model, tokenizer = tiny_model(name).double(), byte_tokenizer()
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(f'{{"text": "{chr(97 + i) * (6 + 3 * i * padded)} words and more"}}' for i in range(4)))
    windows = make_windows(str(path), tokenizer, samples=4, seqlen=20, seed=0, pack=False)
    family = get_family(model.config.to_dict())
    found, forward_only = Collected(), Collected()
    collect_fisher(model, family, windows, found, seed=7, batch_size=4)
    collect_moments(model, family, windows, forward_only, batch_size=4)
    moments, fisher, plain = found.moments, found.fisher, forward_only.moments
    assert not model.training and all(p.requires_grad and p.grad is None for p in model.parameters())

    outputs = {}
    handles = []
    for projection in ("k_proj", "v_proj"):
        module = model.model.layers[1].self_attn.get_submodule(projection)
        handles.append(
            module.register_forward_hook(
                lambda m, i, o, key=projection: (o.retain_grad(), outputs.update({key: (o, m.bias)}))[0]
            )
        )
    (batch,) = windows.batches(4)
    counted = batch.attention_mask.bool()
    logits = model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    logits.backward(sampled_gradient(logits, counted, label_variates(4, 20, seed=7)))
    for handle in handles:
        handle.remove()
    y = torch.cat([o.detach() - (0 if b is None else b.detach()) for o, b in outputs.values()], -1)[counted]
    g = torch.cat([o.grad for o, _ in outputs.values()], -1)[counted]
    expected = FisherMoments.zeros(y.shape[1])
    expected.update(y, g, FisherMoments.leverage_metric(plain[1].second_moment))
    for key, tensor in expected.to_tensors().items():
        torch.testing.assert_close(fisher[1].to_tensors()[key], tensor, rtol=1e-6, atol=1e-9)
    for key, tensor in plain[1].to_tensors().items():
        torch.testing.assert_close(moments[1].to_tensors()[key], tensor, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_statistics_do_not_depend_on_batches(name: str, text_file: Path) -> None:
    """Gradients weighed by moments that were still growing moved G of the first layer by 8 to 37%; labels hung on the batch, too."""
    model, family = tiny_model(name).double(), get_family(tiny_model(name).config.to_dict())
    windows = make_windows(str(text_file), byte_tokenizer(), samples=8, seqlen=24, seed=0)
    found = {}
    for batch_size in (1, 3, 8):
        found[batch_size] = Collected()
        norms = {"normalized": True} if name == "qwen3" else {}
        collect_fisher(model, family, windows, found[batch_size], batch_size=batch_size, **norms)
    for other in (found[1], found[3]):
        for kind in ("moments", "fisher", "normalized_fisher", "normalized"):
            sums, expected = getattr(other, kind), getattr(found[8], kind)
            assert sums.keys() == expected.keys() and (sums or "normalized" in kind)
            for layer in sums:
                for key, tensor in expected[layer].to_tensors().items():
                    torch.testing.assert_close(sums[layer].to_tensors()[key], tensor, rtol=1e-6, atol=1e-9)


def test_pipeline_refuses_what_does_not_fit(tiny: Callable[..., Path], tmp_path: Path, text_file: Path) -> None:
    source = tiny()
    text = {"calibration": str(text_file), "samples": 4, "seqlen": 32}
    with pytest.raises(ConfigError, match="--ranks energy"):
        care_mla.convert(source, tmp_path / "out", kv_save=0.5, method="care", ranks="fisher", calibration=text)
    stats = care_mla.calibrate(source, tmp_path / "stats", fisher=False, **text)
    with pytest.raises(CalibrationError, match="calibrated with --no-fisher"):
        care_mla.convert(source, tmp_path / "out", kv_save=0.5, method="fisher", stats=stats)
    assert not (tmp_path / "out").exists()


def test_sampled_gradient_is_that_of_cross_entropy() -> None:
    """Labels are read off the gradient itself; padding gets none, and the draws follow the prediction."""
    generator = torch.Generator().manual_seed(3)
    logits = (2 * torch.randn(2, 500, 6, generator=generator)).requires_grad_()
    counted = torch.ones(2, 500, dtype=torch.long)
    counted[1, 300:] = 0
    gradient = sampled_gradient(logits, counted, label_variates(2, 500, seed=3))
    labels = gradient.argmin(-1)[counted.bool()]
    torch.nn.functional.cross_entropy(logits[counted.bool()], labels, reduction="sum").backward()
    torch.testing.assert_close(gradient, logits.grad)
    drawn = torch.bincount(labels, minlength=6) / len(labels)
    torch.testing.assert_close(drawn, logits[counted.bool()].softmax(-1).mean(0), atol=0.05, rtol=0)


@pytest.mark.parametrize("layout", ["joint", "split"])
@pytest.mark.parametrize("centred", [False, True])
def test_predicted_loss_increase_is_the_quadratic_form(layout: str, centred: bool) -> None:
    """Where gradients do not depend on outputs, E[(g^T e)^2] / 2 measured on many tokens."""
    generator = torch.Generator().manual_seed(5)
    mix = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    y = torch.randn(40000, 8, generator=generator, dtype=torch.float64) @ mix + 0.7
    g = torch.randn(40000, 8, generator=generator, dtype=torch.float64) @ mix.T.flip(0) * 0.1
    moments, fisher = Moments.zeros(8, 8), FisherMoments.zeros(8)
    moments.update(y, y)
    fisher.update(y, g, FisherMoments.leverage_metric(moments.second_moment))
    blocks = get_layout(layout).rows(4)
    factors = [truncate(decompose(moments.second_moment[rows, rows]), 3) for rows in blocks]
    mean = moments.mean if centred else None
    error = reconstruction_error(factors, 8, rows=blocks)
    lost = (y - (moments.mean if centred else 0.0)) @ error.T
    measured = 0.5 * float((lost * g).sum(1).square().mean())
    predicted = predicted_loss_increase(factors, LayerStatistics(moments, fisher), rows=blocks, centre=mean)
    assert predicted == pytest.approx(measured, rel=0.03)


def test_too_few_tokens_are_counted_and_named(tiny: Callable[..., Path], tmp_path: Path, text_file: Path) -> None:
    source = tiny()
    few = {"calibration": {"calibration": str(text_file), "samples": 2, "seqlen": 16}}
    (note,) = care_mla.convert(source, tmp_path / "noted", kv_save=0.5, **few)["notes"]
    assert "calibrated on 32 tokens, fewer than the 64 directions" in note and "effective rank" in note
    with pytest.raises(
        NumericalError, match=r"layer \d, calibrated on 32 tokens: .* has \d+ independent directions of 48"
    ):
        care_mla.convert(source, tmp_path / "refused", kv_save=0.5, fisher_shrinkage=0.0, **few)
    enough = {"calibration": {"calibration": str(text_file), "samples": 8, "seqlen": 32}}
    assert care_mla.convert(source, tmp_path / "silent", kv_save=0.5, **enough)["notes"] == []


def test_dead_layer_is_named(text_file: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    windows = make_windows(str(text_file), byte_tokenizer(), samples=2, seqlen=16, seed=0)
    with pytest.raises(CalibrationError, match=r"layer 1: .*o_proj.weight is all zero.*gradients are all zero"):
        collect_fisher(model, get_family(model.config.to_dict()), windows, Collected())


def test_broken_autograd_is_refused(text_file: Path) -> None:
    model = tiny_model("llama")
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: output.detach())
    windows = make_windows(str(text_file), byte_tokenizer(), samples=2, seqlen=16, seed=0)
    with pytest.raises(CalibrationError, match=r"use --no-fisher .care calibrate. or --method care"):
        collect_fisher(model, get_family(model.config.to_dict()), windows, Collected())


def test_labels_are_drawn_from_the_prediction() -> None:
    """Blocks that do not divide the vocabulary, blocks without mass and a label of zero probability included."""
    probabilities = torch.tensor([0.1, 0.0, 0.3, 0.0, 0.0, 0.2, 0.4])
    drawn = draw_labels(probabilities.repeat(20_000, 1), label_variates(20, 1000, seed=0).flatten(), block=2)
    shares = torch.bincount(drawn[:, 0], minlength=7) / len(drawn)
    assert drawn.shape == (20_000, 1) and drawn.max() < 7
    torch.testing.assert_close(shares, probabilities, atol=0.015, rtol=0.0)
    assert (shares[probabilities == 0] == 0).all()
