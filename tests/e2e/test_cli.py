"""The commands as a user types them, right and wrong: one sentence on stderr, nothing half-written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

import care_mla

CARE = [sys.executable, "-c", "from care_mla.cli import main; main()"]


Care = Callable[..., str]


def test_the_whole_way(care: Care, tiny: Callable[..., Path], tmp_path: Path, text_file: Path) -> None:
    source, stats, out = tiny("qwen3"), tmp_path / "stats", tmp_path / "out"
    assert "QK-norm" in care("inspect", source)
    care(
        "calibrate",
        source,
        "--out",
        stats,
        "--calibration",
        text_file,
        "--samples",
        8,
        "--seqlen",
        32,
        "--inputs",
    )
    for method in ("svd", "asvd", "svd_llm", "care", "care_c", "fisher"):
        care("convert", source, "--out", out, "--stats", stats, "--method", method, "--kv-save", 0.5, "--overwrite")
    printed = care(
        "convert",
        source,
        "--out",
        out,
        "--stats",
        stats,
        "--layout",
        "split",
        "--method",
        "care",
        "--ranks",
        "care",
        "--rank",
        16,
        "--overwrite",
    )
    assert "50.0%" in printed
    care(
        "evaluate",
        out,
        "--text",
        text_file,
        "--seqlen",
        32,
        "--windows",
        2,
        "--reference",
        source,
        "--json",
        tmp_path / "eval.json",
    )
    result = json.loads((tmp_path / "eval.json").read_text())
    assert result["loss_increase"] == pytest.approx(result["loss"] - result["reference_loss"])
    assert result["kl"] > 0 and 0 < result["top1_agreement"] <= 1
    assert result["cache"]["elements_per_token"] * 2 == result["reference_cache"]["elements_per_token"]
    (out / "care_report.html").unlink()
    care("report", out)
    page = (out / "care_report.html").read_text()
    assert (
        page.count("<svg") == 6
        and f"{result['perplexity']:.3f}" in page
        and "http://"
        not in page.replace("http://www.w3.org", "")
        .replace("http://purl.org", "")
        .replace("http://creativecommons.org", "")
    )
    manifest = json.loads((out / "care_manifest.json").read_text())
    assert manifest["plan"]["ranks"] == [layer["ranks"] for layer in manifest["layers"]]
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert (out / "generation_config.json").is_file()


def test_plan_predicts_and_writes_no_model(
    care: Care, tiny: Callable[..., Path], tmp_path: Path, text_file: Path
) -> None:
    source, stats = tiny(), tmp_path / "stats"
    text = ["--calibration", text_file, "--samples", 8, "--seqlen", 32]
    care("calibrate", source, "--out", stats, *text)
    before = set(tmp_path.rglob("*"))
    files = ["--plot", tmp_path / "plan.png", "--json", tmp_path / "plan.json"]
    printed = care("plan", source, "--stats", stats, "--kv-save", "0.25,0.5", *files)
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "plan.png", tmp_path / "plan.json"}
    forecasts = json.loads((tmp_path / "plan.json").read_text())["forecasts"]
    assert len(forecasts) == 5 * 2
    ours, theirs = ([f for f in forecasts if f["recipe"]["method"] == m][-1] for m in ("fisher", "care"))
    assert ours["kv_save"] == theirs["kv_save"] == 0.5
    assert ours["predicted_loss_increase"] < theirs["predicted_loss_increase"]
    assert all(f"{f['predicted_loss_increase']:.4f}" in printed for f in forecasts)

    manifest = care_mla.convert(source, tmp_path / "out", stats=stats, kv_save=0.5)
    same = next(f for f in forecasts if f["recipe"]["layout"] == "joint" and f["kv_save"] == 0.5)
    assert manifest["plan"] == same["plan"]
    assert manifest["predicted_loss_increase"] == pytest.approx(same["predicted_loss_increase"])

    care("calibrate", source, "--out", stats, *text, "--no-fisher", "--overwrite")
    printed = care("plan", source, "--stats", stats, "--kv-save", "0.5", *files, "--rank-multiple", 8)
    assert "unknown" in printed and "--no-fisher" in printed and "fisher ranks" not in printed


def test_refit_is_asked_for_or_chosen_by_budget(
    care: Care, tiny: Callable[..., Path], tmp_path: Path, text_file: Path
) -> None:
    source, stats, out = tiny(), tmp_path / "stats", tmp_path / "out"
    care("calibrate", source, "--out", stats, "--calibration", text_file, "--samples", 8, "--seqlen", 32)
    common = ["convert", source, "--out", out, "--stats", stats, "--overwrite"]
    for options, refitted in (
        (["--kv-save", 0.5], False),
        (["--kv-save", 0.75], True),
        (["--kv-save", 0.75, "--no-refit"], False),
        (["--kv-save", 0.75, "--method", "care"], False),
        (["--kv-save", 0.5, "--method", "care", "--refit", "--refit-tokens", 64], True),
    ):
        assert ("refitted" in care(*common, *options)) == refitted
        manifest = json.loads((out / "care_manifest.json").read_text())
        assert manifest["recipe"]["refit"] == refitted == ("output_error" in manifest["layers"][0])
    assert "Refit of the output projections" in (out / "care_report.html").read_text()
    (stats / "windows.safetensors").unlink()
    assert "care calibrate" in care(*common, "--kv-save", 0.75, code=1)


@pytest.fixture
def source(tiny: Callable[..., Path]) -> Path:
    return tiny()


def _config(source: Path, **changes: object) -> None:
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


REFUSED = {
    "no such source": (["convert", "/no/such/model", "--out", "OUT", "--rank", "4"], "does not exist"),
    "no budget": (["convert", "SOURCE", "--out", "OUT"], "exactly one of --rank, --kv-save, --cache-elements"),
    "rank too large": (["convert", "SOURCE", "--out", "OUT", "--rank", "33"], "outside 1..32"),
    "all of the cache saved": (["convert", "SOURCE", "--out", "OUT", "--kv-save", "1"], "outside [0, 1)"),
    "impossible bounds": (
        ["convert", "SOURCE", "--out", "OUT", "--rank", "4", "--ranks", "care", "--min-rank", "40", "--max-rank", "8"],
        "rank bounds",
    ),
    "shrinkage": (["convert", "SOURCE", "--out", "OUT", "--rank", "4", "--shrinkage", "2"], "--shrinkage"),
    "absent text": (["calibrate", "SOURCE", "--out", "OUT", "--calibration", "/no/text.txt"], "neither a file nor"),
    "absent statistics": (
        ["convert", "SOURCE", "--out", "OUT", "--rank", "4", "--stats", "/no/stats"],
        "no stats.json",
    ),
    "out is the source": (
        ["convert", "SOURCE", "--out", "SOURCE", "--rank", "4", "--overwrite"],
        "would replace the source",
    ),
    "report of a source": (["report", "SOURCE"], "care_manifest.json"),
    "plan without statistics": (["plan", "SOURCE", "--stats", "/no/stats"], "no stats.json"),
    "plot format": (["plan", "SOURCE", "--stats", "/no/stats", "--plot", "plan.txt"], ".svg, .png, .pdf"),
    "plot folder": (["plan", "SOURCE", "--stats", "/no/stats", "--plot", "/no/plan.svg"], "not a directory"),
    "no refit ridge": (["convert", "SOURCE", "--out", "OUT", "--rank", "4", "--refit-ridge", "0"], "--refit-ridge"),
    "long windows": (["evaluate", "SOURCE", "--text", "TEXT", "--seqlen", "100000"], "tokens, 8 windows"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(care: Care, case: str, source: Path, tmp_path: Path, text_file: Path) -> None:
    words, message = REFUSED[case]
    names = {"SOURCE": source, "OUT": tmp_path / "out", "TEXT": text_file}
    before = sorted(tmp_path.rglob("*"))
    printed = care(*(names.get(word, word) for word in words), code=1)
    assert message in printed and printed.count("\n") <= 2
    assert sorted(tmp_path.rglob("*")) == before


def test_usage_errors(care: Care, source: Path) -> None:
    assert "--out" in care("convert", source, code=2)
    assert "0.5,0.75" in care("plan", source, "--stats", "x", "--kv-save", "half", code=2)
    assert "--stats" in care("plan", source, "--layout", "split", code=2)
    budget = ["convert", source, "--out", "out", "--rank", "4"]
    for option, choices in (("--method", "svd_llm"), ("--ranks", "energy"), ("--layout", "joint")):
        printed = care(*budget, option, "magic", code=2)
        assert f"{option}" in printed and "'magic'" in printed and choices in printed


def test_unknown_architecture(care: Care, source: Path, tmp_path: Path) -> None:
    _config(source, model_type="mamba", architectures=["MambaForCausalLM"])
    printed = care("convert", source, "--out", tmp_path / "out", "--rank", 4, code=1)
    assert "MambaForCausalLM" in printed and "no attention" in printed and not (tmp_path / "out").exists()


def test_statistics_of_another_model(
    care: Care, source: Path, tiny: Callable[..., Path], tmp_path: Path, text_file: Path
) -> None:
    other = tiny(directory=tmp_path / "other", seed=9)
    care("calibrate", other, "--out", tmp_path / "stats", "--calibration", text_file, "--samples", 2, "--seqlen", 32)
    printed = care("convert", source, "--out", tmp_path / "out", "--rank", 4, "--stats", tmp_path / "stats", code=1)
    assert "calibrated on another model" in printed and not (tmp_path / "out").exists()


def _damage(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = float("inf")


def _overflow(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.mlp.down_proj.weight"][:] = 3e38


def _lose(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.1.self_attn.k_proj.weight"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_damage, "model.layers.1.mlp.down_proj.weight holds NaN or infinite numbers"),
        (_overflow, "layer 2: non-finite activations"),
        (_lose, "model.layers.1.self_attn.k_proj.weight"),
    ],
)
def test_damaged_weights_are_named(
    damage: Callable[[dict[str, Tensor]], None], message: str, care: Care, source: Path, tmp_path: Path, text_file: Path
) -> None:
    tensors = load_file(source / "model.safetensors")
    damage(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    text = ["--calibration", text_file, "--samples", 2, "--seqlen", 32]
    printed = care("convert", source, "--out", tmp_path / "out", "--rank", 4, *text, code=1)
    assert message in printed and not (tmp_path / "out").exists()


def test_fewer_documents_than_asked_reach_the_user(care: Care, tiny: Callable[..., Path], tmp_path: Path) -> None:
    """In the terminal, in the statistics, and in the manifest of what they made."""
    source, stats, text = tiny(), tmp_path / "stats", tmp_path / "d.jsonl"
    text.write_text("".join(json.dumps({"text": f"document {i} of ten"}) + "\n" for i in range(10)))
    options = ["--calibration", text, "--no-pack", "--samples", 16, "--seqlen", 16]
    said = f"note: {text} gave 10 documents, fewer than the 16 windows asked of it"
    assert said in care("calibrate", source, "--out", stats, *options)
    assert "gave 10 documents" in json.loads((stats / "stats.json").read_text())["notes"][0]
    recipe = ["--method", "svd", "--kv-save", 0.5]
    assert said in care("convert", source, "--out", tmp_path / "a", "--stats", stats, *recipe)
    assert said in care("convert", source, "--out", tmp_path / "b", *options, *recipe)
    assert "gave 10 documents" in (tmp_path / "b" / "care_report.html").read_text()


def test_chats_calibrate_evaluate_and_heal(care: Care, tiny: Callable[..., Path], tmp_path: Path) -> None:
    source, text = tiny(), tmp_path / "chat.JSONL"
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    (source / "chat_template.jinja").write_text(template)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho " * 20}]
    text.write_text((json.dumps({"messages": turns}, ensure_ascii=False) + "\n") * 40)
    words = ["--kv-save", 0.5, "--method", "svd", "--calibration", text, "--samples", 4, "--seqlen", 32]
    heal = ["--heal-tokens", 256, "--heal-data", text, "--device", "cpu"]
    care("convert", source, "--out", tmp_path / "out", *words, *heal)
    printed = care("evaluate", tmp_path / "out", "--text", text, "--windows", 2, "--seqlen", 32)
    assert "perplexity" in printed
