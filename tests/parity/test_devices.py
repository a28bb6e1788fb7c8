"""Models spread over devices. `meta` is the second one: torch refuses to mix it with the CPU, as it would two accelerators."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from tiny import tiny_model
from torch import Tensor

import care_mla
from care_mla.modeling import CACHE_NAME, CareMlaConfig, CareMlaForCausalLM, cache_of

pytestmark = pytest.mark.usefixtures("no_figures")

IDS = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _steps(model: Any) -> Tensor:
    """Logits of a prefill and of two more passes that read its cache."""
    logits, cache = [], None
    for ids in (IDS, IDS[:, :1], IDS[:, :2]):
        output = model(ids, use_cache=True, **{CACHE_NAME: cache})
        cache = cache_of(output)
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("joint", "llama"),
        ("split", "qwen2"),
        ("joint", "gemma3"),
        ("joint", "phi3-partial"),
        ("joint", "smollm3"),
        ("mla", "llama"),
        ("mla", "qwen3"),
    ],
)
def test_layers_on_two_devices(layout: str, name: str) -> None:
    more: dict[str, Any] = {"k_lora_rank": [5, 7, 9]} if layout == "split" else {"v_bias": layout != "mla"}
    more |= {"rope_frequencies": [[0, 1, 2]] * 3} if layout == "mla" else {}
    text = tiny_model(name).config.to_dict()
    model = CareMlaForCausalLM(CareMlaConfig(text_config=text, layout=layout, kv_lora_rank=[12, 10, 16], **more)).eval()
    inner = model.language_model
    for module in (*inner.model.layers[1:], inner.model.norm, inner.lm_head):
        module.to("meta")
        # What a device map puts before every module.
        add_hook_to_module(module, AlignDevicesHook("meta", skip_keys=list(model._skip_keys_device_placement)))
    assert _steps(model).device.type == "meta"


def _map(*, second: str) -> dict[str, str]:
    parts = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.norm", "lm_head")
    return {f"language_model.{part}": second if part.endswith("layers.1") else "cpu" for part in parts}


@pytest.mark.parametrize("layout", ["joint", "split", "mla"])
def test_device_maps(layout: str, converted: Callable[[str], Path], tmp_path: Path) -> None:
    directory = converted(layout)
    expected = _steps(care_mla.load(directory))
    for device_map in ({"": "cpu"}, "auto", _map(second="disk")):
        model = care_mla.load(directory, device_map=device_map, offload_folder=str(tmp_path))
        torch.testing.assert_close(_steps(model), expected, atol=1e-5, rtol=0)
    assert any(parameter.is_meta for parameter in model.parameters())  # the last one did offload
    assert set(model._no_split_modules) == {"LlamaDecoderLayer"}


def test_offloaded_norms_and_tied_weights(tiny: Callable[..., Path], tmp_path: Path, text_file: Path) -> None:
    """QK-norm's rotary queries read a weight that is not there between calls; the head shares the embedding's."""
    source, out = tiny("qwen3", tie_word_embeddings=True, num_hidden_layers=2), tmp_path / "out"
    text = {"calibration": str(text_file), "samples": 4, "seqlen": 32}
    care_mla.convert(source, out, layout="mla", method="care", kv_save=0.5, qk_rope_head_dim=8, calibration=text)
    offloaded = care_mla.load(out, device_map=_map(second="disk"), offload_folder=str(tmp_path / "off"))
    torch.testing.assert_close(_steps(offloaded), _steps(care_mla.load(out)), atol=1e-5, rtol=0)
    assert offloaded.get_output_embeddings().weight is offloaded.get_input_embeddings().weight
