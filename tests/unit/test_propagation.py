"""Error propagation: the closed form, its moments, and the walk through a model against a literal one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, tiny_model
from torch import Tensor

import care_mla
from care_mla.calibration import Propagation
from care_mla.errors import CalibrationError, NumericalError
from care_mla.families import get_family
from care_mla.layouts import DenseProjections
from care_mla.linalg import ridge_refit
from care_mla.stats import CrossMoments
from care_mla.text import TokenWindows, make_windows

GENERATOR = torch.Generator().manual_seed(0)
A = torch.randn(50, 6, generator=GENERATOR, dtype=torch.float64)
T = torch.randn(50, 4, generator=GENERATOR, dtype=torch.float64)
W = torch.randn(4, 6, generator=GENERATOR, dtype=torch.float64)
WEIGHT = torch.rand(50, generator=GENERATOR, dtype=torch.float64)


def _moments(rows: slice = slice(None)) -> CrossMoments:
    moments = CrossMoments.zeros(6, 4)
    moments.update(A[rows], T[rows], WEIGHT[rows])
    return moments


def test_without_ridge_it_is_weighted_least_squares() -> None:
    moments = _moments()
    root = WEIGHT.sqrt()[:, None]
    expected = torch.linalg.lstsq(A * root, T * root).solution.T
    torch.testing.assert_close(ridge_refit(W, moments.input_second, moments.cross, 1e-12), expected)


@pytest.mark.parametrize("ridge", [0.01, 0.1, 1.0, 10.0])
def test_ridge_pulls_toward_the_given_map(ridge: float) -> None:
    """Against the stated minimization, solved by stacking the penalty as further rows."""
    moments = _moments()
    refitted = ridge_refit(W, moments.input_second, moments.cross, ridge)
    root = WEIGHT.sqrt()[:, None]
    pull = float(ridge * moments.input_second.diagonal().mean()) ** 0.5 * torch.eye(6, dtype=torch.float64)
    stacked = torch.linalg.lstsq(torch.cat([A * root, pull]), torch.cat([T * root, pull @ W.T])).solution.T
    torch.testing.assert_close(refitted, stacked)
    assert moments.relative_error(refitted) < moments.relative_error(W)


def test_a_map_that_explains_everything_stays() -> None:
    moments = CrossMoments.zeros(6, 4)
    moments.update(A, A @ W.T, WEIGHT)
    torch.testing.assert_close(ridge_refit(W, moments.input_second, moments.cross, 0.1), W)
    assert moments.relative_error(W) == pytest.approx(0.0, abs=1e-12)


def test_relative_error_is_the_measured_one_and_batches_add() -> None:
    moments = _moments(slice(20, 50)).merge(_moments(slice(0, 20)))
    measured = (WEIGHT * (T - A @ W.T).square().sum(1)).sum() / (WEIGHT * T.square().sum(1)).sum()
    assert moments.relative_error(W) == pytest.approx(float(measured)) and int(moments.num_tokens) == 50


@pytest.mark.parametrize("bad", [0.0, float("nan")])
def test_useless_inputs_are_refused(bad: float) -> None:
    second = torch.full((6, 6), bad, dtype=torch.float64)
    with pytest.raises(NumericalError, match="all zero or not finite"):
        ridge_refit(W, second, torch.zeros(4, 6, dtype=torch.float64), 0.1)


def _windows(tmp_path: Path, *, padded: bool) -> TokenWindows:
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(f'{{"text": "{chr(97 + i) * (6 + 3 * i * padded)} words and more"}}' for i in range(5)))
    return make_windows(str(path), byte_tokenizer(), samples=5, seqlen=20, seed=0, pack=False)


def _bent(model: Any, layer: int) -> DenseProjections:
    """Noisy projections with biases, as a conversion would give."""
    generator = torch.Generator().manual_seed(layer)
    attention = model.model.layers[layer].self_attn

    def noisy(linear: torch.nn.Linear) -> tuple[Tensor, Tensor]:
        weight = linear.weight.detach().double()
        bias = torch.zeros(len(weight)) if linear.bias is None else linear.bias.detach()
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        return weight + 0.05 * noise, bias.double() + 0.1 * torch.randn(len(weight), generator=generator)

    (k, k_bias), (v, v_bias) = noisy(attention.k_proj), noisy(attention.v_proj)
    return DenseProjections(k, v, k_bias, v_bias)


def _install(model: Any, layer: int, projections: DenseProjections) -> None:
    attention = model.model.layers[layer].self_attn
    for name, weight, bias in (
        ("k_proj", projections.k, projections.k_bias),
        ("v_proj", projections.v, projections.v_bias),
    ):
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0])
        linear.weight.data, linear.bias.data = weight.float(), bias.float()
        setattr(attention, name, linear)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "llama-mqa-bias", "qwen3", "mistral", "qwen2-window"])
@pytest.mark.parametrize("padded", [False, True])
def test_walk_equals_whole_models_run_anew_for_every_layer(name: str, padded: bool, tmp_path: Path) -> None:
    model, windows = tiny_model(name), _windows(tmp_path, padded=padded)
    edited, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    propagation = Propagation(model, get_family(model.config.to_dict()), windows, ridge=0.1, batch_size=2)
    (batch,) = windows.batches(5)
    counted = batch.attention_mask.bool()

    def run(which: Any, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Stream entering a layer, input and output of its output projection, on all tokens that count."""
        seen: dict[str, Tensor] = {}
        attention = which.model.layers[layer].self_attn
        handles = [
            which.model.layers[layer].register_forward_pre_hook(lambda m, i: seen.update(stream=i[0])),
            attention.o_proj.register_forward_hook(lambda m, i, o: seen.update(context=i[0], output=o)),
        ]
        which(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        for handle in handles:
            handle.remove()
        return tuple(seen[key][counted].double() for key in ("stream", "context", "output"))

    for layer in range(3):
        projections = _bent(model, layer)
        refit = propagation.refit(layer, projections)
        _install(edited, layer, projections)
        o_proj = edited.model.layers[layer].self_attn.o_proj
        h_o, _, output = run(model, layer)
        h_c, context, _ = run(edited, layer)
        bias = 0.0 if o_proj.bias is None else o_proj.bias.double()
        root = (1.0 / (h_o + output).square().mean(1)).sqrt()[:, None]
        target = h_o + output - h_c - bias
        second, cross = (context * root).T @ (context * root), (target * root).T @ (context * root)
        expected = ridge_refit(o_proj.weight.double(), second, cross, 0.1)
        torch.testing.assert_close(refit.weight, expected, atol=1e-4, rtol=1e-4)
        assert refit.error_after < refit.error_before
        o_proj.weight.copy_(refit.weight)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all("forward" not in vars(layer) for layer in model.model.layers)


def test_nothing_to_refit_changes_nothing(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    propagation = Propagation(model, get_family(model.config.to_dict()), _windows(tmp_path, padded=True), ridge=0.1)
    for layer in range(3):
        attention = model.model.layers[layer].self_attn
        same = DenseProjections(
            attention.k_proj.weight.double(),
            attention.v_proj.weight.double(),
            attention.k_proj.bias,
            attention.v_proj.bias,
        )
        refit = propagation.refit(layer, same)
        torch.testing.assert_close(refit.weight, attention.o_proj.weight.detach().double(), atol=1e-4, rtol=0)


def test_dead_attention_is_named(tmp_path: Path) -> None:
    model = tiny_model("llama")
    propagation = Propagation(model, get_family(model.config.to_dict()), _windows(tmp_path, padded=False), ridge=0.1)
    dead = DenseProjections(torch.zeros(32, 48), torch.zeros(32, 48), None, None)
    with pytest.raises(CalibrationError, match=r"layer 0: .*--no-refit"):
        propagation.refit(0, dead)


def test_thinned_windows_are_evenly_spaced_and_survive_the_disk() -> None:
    windows = TokenWindows(torch.arange(40).view(10, 4), torch.full((10,), 4), torch.ones(10, dtype=torch.float64))
    assert windows.thinned(17).input_ids[:, 0].tolist() == [0, 12, 24, 36]
    assert len(windows.thinned(1)) == 1 and len(windows.thinned(10**6)) == 10
    again = TokenWindows.from_tensors(windows.to_tensors())
    assert torch.equal(again.input_ids, windows.input_ids) and again.input_ids.dtype == torch.long


@torch.no_grad()
def test_a_factor_on_the_residual_branch_is_part_of_the_refit(
    tiny: Callable[..., Path], tmp_path: Path, text_file: Path
) -> None:
    """Granite is Llama with its multipliers folded into embeddings, o_proj and down_proj; so must its refit be."""
    multipliers = {"attention_multiplier": 0.25, "embedding_multiplier": 3.0, "logits_scaling": 1.0}
    granite = tiny("granite", residual_multiplier=0.4, **multipliers)
    llama = tiny("llama", rms_norm_eps=1e-6)
    folded = load_file(granite / "model.safetensors")
    for name, weight in folded.items():
        if "embed_tokens" in name:
            folded[name] = 3.0 * weight
        if "o_proj" in name or "down_proj" in name:
            folded[name] = 0.4 * weight
    save_file(folded, llama / "model.safetensors", metadata={"format": "pt"})
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(care_mla.load(llama)(ids).logits, care_mla.load(granite)(ids).logits, atol=1e-4, rtol=0)
    refitted = []
    for source in (granite, llama):
        out = tmp_path / f"{source.name}-out"
        options = {"calibration": {"calibration": str(text_file), "samples": 16, "seqlen": 48}, "method": "care"}
        care_mla.convert(source, out, rank=10, ranks="uniform", refit=True, **options)
        refitted.append(load_file(out / "model.safetensors"))
    name = "language_model.model.layers.2.self_attn.o_proj.weight"
    torch.testing.assert_close(0.4 * refitted[0][name], refitted[1][name], atol=2e-3, rtol=0)
    assert (refitted[1][name] - folded[name.removeprefix("language_model.")]).abs().max() > 0.02  # it did move
