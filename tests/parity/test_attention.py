"""The two ways to compute one attention, and the cache's life beside generate()."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model
from transformers import DynamicCache

from care_mla.errors import ConfigError
from care_mla.modeling import CACHE_NAME, CareMlaConfig, CareMlaForCausalLM, LatentCache, cache_of
from care_mla.modeling import attention as attention_module

pytestmark = pytest.mark.usefixtures("no_figures")

IDS = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(0))


def _converted(layout: str = "joint", name: str = "qwen2") -> CareMlaForCausalLM:
    text = tiny_model(name).config
    torch.manual_seed(1)
    split = {"k_lora_rank": [5, 7, 9]} if layout == "split" else {}
    model = CareMlaForCausalLM(
        CareMlaConfig(
            text_config=text.to_dict(), layout=layout, kv_lora_rank=[12, 10, 16], k_bias=True, v_bias=True, **split
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.5)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("layout", ["split", "joint"])
@pytest.mark.parametrize("name", ["qwen2", "qwen2-window"])
def test_absorbed_equals_expanded(
    name: str, layout: str, padded: bool, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _converted(layout, name)
    model.set_attn_implementation(implementation)
    mask = torch.ones_like(IDS)
    mask[0, : 5 if padded else 0] = 0
    logits = []
    for absorb in (False, True):
        monkeypatch.setattr(attention_module, "absorbing_is_cheaper", lambda *_, absorb=absorb: absorb)
        prefill = model(IDS, attention_mask=mask, use_cache=True)
        step = model(
            IDS[:, :3],
            attention_mask=torch.cat([mask, mask[:, -3:]], 1),
            **{CACHE_NAME: cache_of(prefill)},
            use_cache=True,
        )
        logits.append(torch.cat([prefill.logits[:, 5:], step.logits], dim=1))
    torch.testing.assert_close(*logits, atol=2e-5, rtol=0)


def test_absorbing_pays_when_decoding() -> None:
    assert attention_module.absorbing_is_cheaper(1, 192, 9, 3, 64)
    assert not attention_module.absorbing_is_cheaper(512, 192, 9, 3, 64)


@torch.no_grad()
def test_cache_crop_select_and_repeat_keep_positions() -> None:
    model = _converted()
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    cache = LatentCache(config=model.config)
    model(IDS, attention_mask=mask, position_ids=positions, **{CACHE_NAME: cache})
    cache.crop(-2)
    assert cache.get_seq_length() == 10 and torch.equal(cache.positions, positions[:, :10].int())
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    assert torch.equal(cache.positions, positions[[1, 0], :10].int())
    swapped = model(
        IDS[[1, 0], 10:], attention_mask=mask[[1, 0]], position_ids=positions[[1, 0], 10:], past_key_values=cache
    )
    whole = model(IDS, attention_mask=mask, position_ids=positions, use_cache=False)
    torch.testing.assert_close(swapped.logits, whole.logits[[1, 0], 10:], atol=2e-5, rtol=0)
    cache.reset()
    assert cache.positions is None and cache.get_seq_length() == 0


@torch.no_grad()
def test_holes_in_the_mask_keep_their_positions() -> None:
    """Two prompts of unlike length, right-padded, then continued: positions cannot be guessed from slots."""
    model = _converted()
    lengths = (4, 7)
    prompt = IDS[:, :7]
    mask = (torch.arange(7)[None] < torch.tensor(lengths)[:, None]).long()
    cache = LatentCache(config=model.config)
    model(prompt, attention_mask=mask, position_ids=torch.arange(7)[None], **{CACHE_NAME: cache})
    step_mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    step = model(
        IDS[:, 7:8], attention_mask=step_mask, position_ids=torch.tensor(lengths)[:, None], past_key_values=cache
    )
    for row, length in enumerate(lengths):
        alone = model(torch.cat([prompt[row, :length], IDS[row, 7:8]])[None], use_cache=False)
        torch.testing.assert_close(step.logits[row, -1], alone.logits[0, -1], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@torch.no_grad()
def test_the_cache_goes_by_both_of_its_names(name: str) -> None:
    """transformers renamed it in 5.24; users and engines pass either."""
    model = _converted()
    cache = LatentCache(config=model.config)
    model(IDS[:, :7], **{name: cache})
    step = model(IDS[:, 7:], **{name: cache})
    assert cache_of(step) is cache and cache.get_seq_length() == IDS.shape[1]
    torch.testing.assert_close(step.logits, model(IDS, use_cache=False).logits[:, 7:], atol=2e-5, rtol=0)


def test_foreign_caches_are_refused() -> None:
    model = _converted()
    with pytest.raises(ConfigError, match="LatentCache"):
        model(IDS, **{CACHE_NAME: DynamicCache()})
    with pytest.raises(ConfigError, match="static"):
        model.generate(IDS, max_new_tokens=2, cache_implementation="static")


def test_gradients_reach_the_factors_and_training_uses_no_cache() -> None:
    model = _converted().train()
    model.gradient_checkpointing_enable()
    loss = model(IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.abs().sum() > 0), name
