"""SmolLM2-135M-Instruct from source to measured conversion; test_reference_perplexity.py holds the numbers."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

import care_mla
from care_mla.evaluation import measure_cache

pytestmark = pytest.mark.xdist_group("real model")  # its tests share their statistics


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "python.txt"
    path.write_text("\n\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def statistics(real_model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("statistics") / "stats"
    return care_mla.calibrate(real_model, out, calibration=str(text), samples=16, fisher=True)


@pytest.mark.usefixtures("no_figures")
@torch.no_grad()
def test_kv_parity_reproduces_the_logits(real_model: Path, statistics: Path, tmp_path: Path) -> None:
    """At the full KV rank the function is the source's: in float64 the logits differ by the rounding of the stored factors alone, in float32 by
    no more than twice what the source's own differ from its float64 (the largest is about 7e-5, at logits of 25)."""
    care_mla.convert(real_model, tmp_path / "full", stats=statistics, rank=192)
    ids = torch.randint(100, 40000, (1, 64), generator=torch.Generator().manual_seed(0))
    source, converted = care_mla.load(real_model), care_mla.load(tmp_path / "full")
    in_float32 = source(ids).logits.double(), converted(ids).logits.double()
    exact = source.double()(ids).logits
    torch.testing.assert_close(converted.double()(ids).logits, exact, atol=5e-5, rtol=0)
    rounding, error = ((logits - exact).square().mean().sqrt() for logits in in_float32)
    assert error <= 2 * rounding


def test_half_the_cache(real_model: Path, statistics: Path, text: Path, tmp_path: Path) -> None:
    """Converted, loaded, measured on the live cache, and still a language model that generates."""
    out = tmp_path / "half"
    manifest = care_mla.convert(real_model, out, stats=statistics, kv_save=0.5)
    assert manifest["kv_save"] == 0.5
    result = care_mla.evaluate(out, str(text), reference=real_model, seqlen=256, windows=4)
    assert result["cache"]["elements_per_token"] == 5760 and result["reference_cache"]["elements_per_token"] == 11520
    assert result["loss_increase"] < 0.05 and result["top1_agreement"] > 0.85
    model = care_mla.load(out)
    usage = measure_cache(model, torch.arange(100, 140)[None])
    assert (
        usage.layer_widths == [sum(ranks) for ranks in manifest["plan"]["ranks"]] and len(set(usage.layer_widths)) > 5
    )
    assert (out / "care_report.html").stat().st_size > 50_000


@pytest.mark.usefixtures("no_figures")
def test_fisher_loses_less_than_care(real_model: Path, statistics: Path, text: Path, tmp_path: Path) -> None:
    """At 75% saving, one text, one set of statistics."""
    losses = {}
    for method, layout in (("care", "split"), ("care", "joint"), ("fisher", "joint")):
        out = tmp_path / f"{method}-{layout}"
        care_mla.convert(real_model, out, stats=statistics, kv_save=0.75, method=method, layout=layout)
        losses[method, layout] = care_mla.evaluate(out, str(text), seqlen=256, windows=4)["loss"]
    assert losses["fisher", "joint"] < losses["care", "joint"] < losses["care", "split"], losses
