"""Half precision: nothing is squared in it, biases do not drown what they are added to, decoding is no noisier than the source's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import Tensor

import care_mla
from care_mla.calibration import Collected, Propagation, collect_fisher, collect_moments
from care_mla.errors import CalibrationError, NumericalError
from care_mla.families import get_family
from care_mla.layouts import DenseProjections
from care_mla.linalg import PositiveMatrix, decompose
from care_mla.modeling import CACHE_NAME, cache_of
from care_mla.stats import CrossMoments, FisherMoments, Moments
from care_mla.text import TokenWindows

HALVES = [torch.float16, torch.bfloat16]
IDS = torch.randint(3, 250, (4, 24), generator=torch.Generator().manual_seed(0))
WINDOWS = TokenWindows(IDS, torch.full((4,), 24), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_activations_of_300_are_not_squared_in_half_precision(dtype: torch.dtype, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (300 + torch.randn(64, 6, generator=generator)).to(dtype)
    y = (300 + torch.randn(64, 4, generator=generator)).to(dtype)
    g = (300 * torch.randn(64, 4, generator=generator)).to(dtype)
    weight = torch.rand(64, generator=generator) if weighted else None
    found, expected = [], []
    for into, (a, b, c) in ((found, (x, y, g)), (expected, (x.double(), y.double(), g.double()))):
        moments, fisher, cross = (
            Moments.zeros(4, 6, with_inputs=True),
            FisherMoments.zeros(4),
            CrossMoments.zeros(6, 4),
        )
        moments.update(a, b, weight)
        fisher.update(b, c, moments.second_moment, weight)
        cross.update(a, b, torch.ones(64) if weight is None else weight)
        into += [t for sums in (moments, fisher, cross) for t in sums.to_tensors().values()]
    for mine, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))


def _biased(name: str, size: float) -> Any:
    """A tiny model in bfloat16 with biases of that size on its keys and values, and of its output projection."""
    model = tiny_model(name, **({"attention_bias": True} if name in ("llama", "qwen3") else {}))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(("k_proj.bias", "v_proj.bias", "qkv_proj.bias")):
                parameter.fill_(size)
    return model.to(torch.bfloat16)


@pytest.mark.parametrize("name", ["llama", "qwen2", "starcoder2"])
def test_moments_are_those_of_the_products_whatever_the_bias(name: str) -> None:
    """Against products of the same inputs in float64; the output minus the bias was 29% off."""
    model = _biased(name, 200.0)
    family = get_family(model.config.to_dict())
    forward_only, both = Collected(), Collected()
    collect_moments(model, family, WINDOWS, forward_only, with_inputs=True)
    collect_fisher(model, family, WINDOWS, both)
    moments, fisher_moments, fisher = forward_only.moments, both.moments, both.fisher
    for layer in range(3):
        attention = model.model.layers[layer].self_attn
        W = torch.cat([attention.k_proj.weight, attention.v_proj.weight]).detach().double()
        for found in (moments[layer], fisher_moments[layer]):
            exact = W @ (moments[layer].input_second / moments[layer].weight) @ W.T
            assert float((found.second_moment - exact).norm() / exact.norm()) < 0.005
        assert float(fisher[layer].mean.abs().max()) < 20  # the bias itself is in no statistic


def test_rows_of_a_fused_projection_with_a_bias() -> None:
    plain, biased = tiny_model("phi3").to(torch.bfloat16), tiny_model("phi3").to(torch.bfloat16)
    for layer in biased.model.layers:
        fused = layer.self_attn.qkv_proj
        fused.bias = torch.nn.Parameter(torch.zeros(fused.out_features, dtype=torch.bfloat16))
        fused.bias.data[-fused.out_features // 2 :] = 200.0
    family = get_family(plain.config.to_dict())
    found = Collected(), Collected()
    for model, sink in zip((plain, biased), found, strict=True):
        collect_moments(model, family, WINDOWS, sink)
    one, other = (sink.moments[0] for sink in found)
    torch.testing.assert_close(one.output_second, other.output_second, rtol=1e-9, atol=1e-9)


def test_refit_targets_leave_the_bias_out_of_the_product() -> None:
    """A large bias of the output projection changes nothing of what a refit is fitted to but the stream's own rounding."""
    model = _biased("starcoder2", 0.1)
    family = get_family(model.config.to_dict())
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        attention.o_proj.bias.fill_(200.0)
    same = DenseProjections(
        attention.k_proj.weight.detach().double(),
        attention.v_proj.weight.detach().double(),
        attention.k_proj.bias.detach().double(),
        attention.v_proj.bias.detach().double(),
    )
    refit = Propagation(model, family, WINDOWS, ridge=0.1).refit(0, same)
    assert refit.error_before < 1e-4  # the converted layer is the original: there is nothing to refit


# --- decoding ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _decoded(model: Any, ids: Tensor) -> Tensor:
    """Logits of the last token of every row, read from a cache of those before it."""
    cache = cache_of(model(ids[:, :-1], use_cache=True, logits_to_keep=1))
    return model(ids[:, -1:], **{CACHE_NAME: cache}, use_cache=True).logits[:, -1].float()


@pytest.mark.parametrize("layout", ["joint", "split", "mla"])
def test_decoding_in_bfloat16_is_no_noisier_than_the_source(
    layout: str, tiny: Callable[..., Path], tmp_path: Path, text_file: Path
) -> None:
    """At full rank, against the same weights in float32; queries ten times larger make scores that rounding would move."""
    source, out = tiny("llama", hidden_size=64, head_dim=32), tmp_path / "out"
    model = care_mla.load(source)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(10.0)
    model.to(torch.bfloat16).save_pretrained(source)
    whole = {"kv_save": 0.0} if layout != "mla" else {"cache_elements": 3 * (128 + 32), "qk_rope_head_dim": 32}
    text = {"calibration": str(text_file), "samples": 8, "seqlen": 32}
    care_mla.convert(source, out, layout=layout, method="care", centre=False, calibration=text, **whole)
    ids = torch.randint(3, 250, (96, 24), generator=torch.Generator().manual_seed(1))
    noise = []
    for directory in (source, out):
        half = care_mla.load(directory, dtype="bfloat16")
        errors = _decoded(half, ids) - _decoded(copy.deepcopy(half).float(), ids)
        noise.append(
            float(errors.square().mean(1).log().mean().div(2).exp())
        )  # geometric: a few rows have most of the mean
    # Scores and contexts that are rounded on the way make split and mla 1.07; keys are rounded once more than the source's.
    assert noise[1] <= 1.06 * noise[0]


# --- factorizations that fail -----------------------------------------------------------------------------------------


def test_a_factorization_that_fails_names_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge.\nmore")

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    eye = torch.eye(3, dtype=torch.float64)
    with pytest.raises(
        NumericalError, match=r"the metric \[3, 3\] could not be factorized \(linalg.eigh.*converge\.\)"
    ):
        PositiveMatrix(eye, name="the metric").power(0.5)
    with pytest.raises(NumericalError, match="the second moment of the outputs"):
        decompose(eye)


def test_outputs_that_are_all_zero_are_refused() -> None:
    nothing = torch.zeros(3, 3, dtype=torch.float64)
    with pytest.raises(NumericalError, match="all zero"):
        decompose(nothing)
    with pytest.raises(CalibrationError, match="outputs are all zero"):
        FisherMoments.leverage_metric(nothing)
