"""Exported checkpoints in stock classes: loaded by a process that never imports care_mla."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import care_mla
from care_mla.errors import CheckpointError, ConfigError, RankError, UnsupportedModelError
from care_mla.evaluation import measure_cache

pytestmark = pytest.mark.usefixtures("no_figures")

STOCK = """
import sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
ids = torch.randint(3, 259, (2, 24), generator=torch.Generator().manual_seed(5))
for line in sys.stdin:
    directory, out, dtype = line.rstrip().split("\t")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
    with torch.no_grad():
        output = model(ids, use_cache=True)
    cache = output.cache if "cache" in output else output.past_key_values
    widths = [sum(t.shape[1] * t.shape[-1] for t in (layer.keys, layer.values)) for layer in cache.layers]
    tokens = model.generate(ids[:1], max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=2)
    assert type(model).__name__ == "DeepseekV3ForCausalLM"
    assert "care_mla" not in sys.modules
    save_file({"logits": output.logits.float(), "widths": torch.tensor(widths), "tokens": tokens}, out)
    print("done", flush=True)
"""
LoadStock = Callable[..., dict[str, torch.Tensor]]
IDS = torch.randint(3, 259, (2, 24), generator=torch.Generator().manual_seed(5))
BIASED = {"attention_bias": True}
SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    "eps 1e-6, untied": ("llama", {"rms_norm_eps": 1e-6}),
    "eps 1e-5, tied": ("llama", {"rms_norm_eps": 1e-5, "tie_word_embeddings": True}),
    "biases": ("llama", {**BIASED, "rms_norm_eps": 1e-5}),
    "qwen2": ("qwen2", {}),
    "mistral": ("mistral", {}),
    "llama3 rope, tied": ("llama-scaled-rope", {}),
    "linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64
            }
        },
    ),
}  # fmt: skip


def _source(kind: str, tiny: Callable[..., Path], **changes: Any) -> Path:
    """A tiny source; Mistral as from v0.3 on, without a window (transformers fills one in where config.json is silent)."""
    name, own = SOURCES[kind]
    directory = tiny(name, **{**own, **changes})
    if name == "mistral":
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "sliding_window": None}))
    return directory


def _convert(source: Path, out: Path, text: Path, **recipe: Any) -> Path:
    options: dict[str, Any] = {"layout": "mla", "rope": "stock", **recipe}
    care_mla.convert(source, out, calibration={"calibration": str(text), "samples": 16, "seqlen": 48}, **options)
    return out


@pytest.fixture(scope="module")
def load_stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadStock]:
    """load_stock(directory) -> logits, cache widths and generated tokens, from a process of its own."""
    errors = tmp_path_factory.mktemp("stock") / "stderr"
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", STOCK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
        )

    def load(directory: Path, dtype: str = "float32") -> dict[str, torch.Tensor]:
        assert process.stdin is not None and process.stdout is not None
        out = directory.parent / f"stock-{dtype}.safetensors"
        process.stdin.write(f"{directory}\t{out}\t{dtype}\n")
        process.stdin.flush()
        assert process.stdout.readline() == "done\n", errors.read_text()
        return load_file(out)

    yield load
    process.communicate()


@torch.no_grad()
@pytest.mark.parametrize("kind", SOURCES)
def test_one_kv_head_is_exact(
    kind: str, tiny: Callable[..., Path], tmp_path: Path, text_file: Path, load_stock: LoadStock
) -> None:
    """All rotary pairs kept: the source's logits in the stock class, and as many cached elements as claimed."""
    source = _source(kind, tiny, num_key_value_heads=1)
    n = care_mla.inspect(source).geometry.kv_width
    converted = _convert(source, tmp_path / "mla", text_file, rank=n, qk_rope_head_dim=n, ranks="uniform")
    record = care_mla.export(converted, tmp_path / "stock")
    loaded = load_stock(tmp_path / "stock")
    original = care_mla.load(source)
    torch.testing.assert_close(loaded["logits"], original(IDS).logits, atol=1e-4, rtol=0)
    generated = original.generate(IDS[:1], max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=2)
    assert torch.equal(loaded["tokens"], generated)
    assert (
        loaded["widths"].tolist() == [n + n] * 3 and int(loaded["widths"].sum()) == record["cache_elements_per_token"]
    )


@torch.no_grad()
@pytest.mark.parametrize("kind", ["eps 1e-5, tied", "biases", "qwen2"])
def test_truncated_equals_the_own_classes(
    kind: str, tiny: Callable[..., Path], tmp_path: Path, text_file: Path, load_stock: LoadStock
) -> None:
    """Several kv heads, half the cache, ranks that differ and are padded."""
    converted = _convert(_source(kind, tiny), tmp_path / "mla", text_file, kv_save=0.5, qk_rope_head_dim=4, min_rank=1)
    record = care_mla.export(converted, tmp_path / "stock")
    own = care_mla.load(converted)
    loaded = load_stock(tmp_path / "stock")
    torch.testing.assert_close(loaded["logits"], own(IDS).logits, atol=1e-4, rtol=0)
    assert loaded["widths"].tolist() == [max(own.config.kv_lora_rank) + 4] * 3
    assert "padding" in record["notes"][0]
    usage = measure_cache(care_mla.load(tmp_path / "stock"), IDS[:1])
    assert usage.layer_widths == loaded["widths"].tolist()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["eps 1e-5, tied", "qwen2"])
def test_low_rank_queries(
    kind: str, tiny: Callable[..., Path], tmp_path: Path, text_file: Path, load_stock: LoadStock
) -> None:
    """q_a_proj, an identity norm and q_b_proj, with and without query biases; at full rank the exact queries."""
    source = _source(kind, tiny)
    recipe = {"kv_save": 0.5, "qk_rope_head_dim": 4, "min_rank": 1}
    converted = _convert(source, tmp_path / "mla", text_file, **recipe, q_lora_rank=20)
    care_mla.export(converted, tmp_path / "stock")
    own = care_mla.load(converted)
    torch.testing.assert_close(load_stock(tmp_path / "stock")["logits"], own(IDS).logits, atol=1e-4, rtol=0)
    assert care_mla.load(tmp_path / "stock").config.q_lora_rank == 20 + (kind == "qwen2")
    full = _convert(source, tmp_path / "full", text_file, **recipe, q_lora_rank=48)
    exact = care_mla.load(_convert(source, tmp_path / "exact", text_file, **recipe))
    torch.testing.assert_close(care_mla.load(full)(IDS).logits, exact(IDS).logits, atol=1e-4, rtol=0)
    assert (own(IDS).logits - exact(IDS).logits).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("q_lora_rank", [None, 20])
@pytest.mark.parametrize("name", ["qwen3", "qwen3-mqa-bias"])
def test_linearized_qk_norm(
    name: str,
    q_lora_rank: int | None,
    tiny: Callable[..., Path],
    tmp_path: Path,
    text_file: Path,
    load_stock: LoadStock,
) -> None:
    """Without scales in the cache, near the source, and the same in the stock class; with exact norms export is refused."""
    source, n = tiny(name), care_mla.inspect(tiny(name, tmp_path / "again")).geometry.kv_width
    options = {"cache_elements": 3 * 2 * n, "qk_rope_head_dim": 16, "ranks": "uniform"}
    converted = _convert(source, tmp_path / "mla", text_file, **options, qk_norm="linear", q_lora_rank=q_lora_rank)
    record = care_mla.export(converted, tmp_path / "stock")
    own, loaded = care_mla.load(converted), load_stock(tmp_path / "stock")
    torch.testing.assert_close(loaded["logits"], own(IDS).logits, atol=1e-4, rtol=0)
    widths = measure_cache(own, IDS[:1]).layer_widths
    assert loaded["widths"].tolist() == widths == [2 * n] * 3 and record["cache_elements_per_token"] == 6 * n
    exact = _convert(source, tmp_path / "exact", text_file, kv_save=0.3, qk_rope_head_dim=16, ranks="uniform")
    with pytest.raises(UnsupportedModelError, match="QK-norm.*--qk-norm linear"):
        care_mla.export(exact, tmp_path / "no")
    if q_lora_rank is None and name == "qwen3":  # the other has an o_proj bias, which vLLM drops
        plain = _convert(source, tmp_path / "plain", text_file, **options, qk_norm="linear", centre=False)
        assert care_mla.load(plain).config.q_bias is False
        care_mla.export(plain, tmp_path / "plain-stock", engine="vllm")
        stock = care_mla.load(tmp_path / "plain-stock")
        torch.testing.assert_close(stock(IDS).logits, care_mla.load(plain)(IDS).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_padding_for_vllm_is_exact(
    tiny: Callable[..., Path], tmp_path: Path, text_file: Path, load_stock: LoadStock
) -> None:
    source = tiny("llama")
    converted = _convert(source, tmp_path / "mla", text_file, kv_save=0.25, qk_rope_head_dim=16, centre=False)
    record = care_mla.export(converted, tmp_path / "stock", engine="vllm")
    assert record["kv_lora_rank"] + record["qk_rope_head_dim"] == 320
    loaded = load_stock(tmp_path / "stock")
    torch.testing.assert_close(loaded["logits"], care_mla.load(converted)(IDS).logits, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_bfloat16_is_within_the_noise_of_the_source(
    eps: float, tiny: Callable[..., Path], tmp_path: Path, text_file: Path, load_stock: LoadStock
) -> None:
    """Errors against float32 of the same weights, in bfloat16: source, and exact conversion in the stock class."""
    source = tiny("llama", num_key_value_heads=1, rms_norm_eps=eps)
    n = care_mla.inspect(source).geometry.kv_width
    exact = care_mla.load(source)(IDS).logits
    noise = (care_mla.load(source, dtype="bfloat16")(IDS).logits.float() - exact).square().mean().sqrt()
    converted = _convert(
        source, tmp_path / "mla", text_file, rank=n, qk_rope_head_dim=n, ranks="uniform", dtype="bfloat16"
    )
    care_mla.export(converted, tmp_path / "stock")
    error = (load_stock(tmp_path / "stock", "bfloat16")["logits"] - exact).square().mean().sqrt()
    assert error < 1.5 * noise


def test_refusals_name_the_reason(tiny: Callable[..., Path], tmp_path: Path, text_file: Path) -> None:
    out = tmp_path / "stock"
    joint = tmp_path / "joint"
    care_mla.convert(
        tiny("llama"), joint, calibration={"calibration": str(text_file), "samples": 4, "seqlen": 48}, rank=8
    )
    with pytest.raises(CheckpointError, match="not a model of layout mla"):
        care_mla.export(joint, out)
    free = _convert(tiny("llama"), tmp_path / "free", text_file, kv_save=0.5, qk_rope_head_dim=8, rope="free")
    with pytest.raises(UnsupportedModelError, match="--rope stock"):
        care_mla.export(free, out)
    stock = _convert(tiny("llama"), tmp_path / "mla", text_file, kv_save=0.5, qk_rope_head_dim=16)
    for wrong, message in (
        ({"target": "gguf"}, "unknown --target"),
        ({"engine": "sglang"}, "unknown --engine"),
        ({"kv_lora_rank": 3}, "less than the widest latent"),
    ):
        with pytest.raises((ConfigError, RankError), match=message):
            care_mla.export(stock, out, **wrong)
    with pytest.raises(UnsupportedModelError, match="--no-centre"):
        care_mla.export(stock, out, engine="vllm")
    plain = _convert(tiny("llama"), tmp_path / "plain", text_file, kv_save=0.5, qk_rope_head_dim=16, centre=False)
    with pytest.raises(RankError, match="320, 512, 576"):
        care_mla.export(plain, out, engine="vllm", kv_lora_rank=100)
    half = _convert(tiny("llama"), tmp_path / "half", text_file, kv_save=0.5, qk_rope_head_dim=16, dtype="float16")
    with pytest.raises(ConfigError, match="bfloat16"):
        care_mla.export(half, out)
    for name, engine, feature in (
        ("mistral", "transformers", "sliding window"),
        ("llama-scaled-rope", "vllm", "RoPE scaling"),
        ("qwen2", "vllm", "qkv bias"),
    ):
        source = _convert(tiny(name), tmp_path / name, text_file, kv_save=0.5, centre=False)
        with pytest.raises(UnsupportedModelError, match=feature):
            care_mla.export(source, out, engine=engine)
    yarn = SOURCES["yarn"][1]
    part = _convert(tiny("llama", **yarn), tmp_path / "yarn", text_file, kv_save=0.5, qk_rope_head_dim=8)
    with pytest.raises(UnsupportedModelError, match="other frequencies"):
        care_mla.export(part, out)
    biased = _convert(tiny("llama", mlp_bias=True), tmp_path / "mlp", text_file, kv_save=0.5, qk_rope_head_dim=16)
    with pytest.raises(UnsupportedModelError, match="does not fit the stock class"):
        care_mla.export(biased, out)
    assert not out.exists() and not list(tmp_path.glob(".stock*"))


@torch.no_grad()
def test_config_entries_left_to_their_defaults(tiny: Callable[..., Path], tmp_path: Path, text_file: Path) -> None:
    """config.json of old checkpoints omits what the class fills in."""
    source = tiny("llama", rms_norm_eps=1e-6)
    path = source / "config.json"
    whole = json.loads(path.read_text())
    path.write_text(
        json.dumps({k: v for k, v in whole.items() if k not in ("rms_norm_eps", "hidden_act", "rope_parameters")})
    )
    converted = _convert(source, tmp_path / "mla", text_file, kv_save=0.5, qk_rope_head_dim=16)
    care_mla.export(converted, tmp_path / "stock")
    torch.testing.assert_close(
        care_mla.load(tmp_path / "stock")(IDS).logits, care_mla.load(converted)(IDS).logits, atol=1e-4, rtol=0
    )


def test_broken_checkpoints_are_refused(tiny: Callable[..., Path], tmp_path: Path, text_file: Path) -> None:
    converted = _convert(tiny("llama"), tmp_path / "mla", text_file, kv_save=0.5, qk_rope_head_dim=16)
    with pytest.raises(ConfigError, match="would replace the source"):
        care_mla.export(converted, converted, overwrite=True)
    whole = load_file(converted / "model.safetensors")
    for missing in ("model.layers.1.self_attn.kv_b_proj.weight", "model.embed_tokens.weight", "model.norm.weight"):
        kept = {name: tensor for name, tensor in whole.items() if name != f"language_model.{missing}"}
        save_file(kept, converted / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=missing):
            care_mla.export(converted, tmp_path / "stock")
    assert not (tmp_path / "stock").exists()
