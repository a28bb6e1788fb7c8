"""The config of a converted model answers for its source, and keeps one copy of what it answers."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

import care_mla
from care_mla.errors import CheckpointError
from care_mla.modeling import CareMlaConfig
from care_mla.modeling.configuration import OF_SOURCE


@pytest.mark.parametrize("layout", ["joint", "mla"])
def test_it_answers_for_the_source_and_writes_it_once(converted: Callable[[str], Path], layout: str) -> None:
    config = AutoConfig.from_pretrained(converted(layout))
    for name in OF_SOURCE:
        assert getattr(config, name) == getattr(config.text_config, name), name
    assert config.max_position_embeddings == 256
    config.max_position_embeddings = 77
    assert config.text_config.max_position_embeddings == 77 == copy.deepcopy(config).max_position_embeddings
    written = config.to_dict()
    assert not set(OF_SOURCE) & set(written) and CareMlaConfig.from_dict(written).to_dict() == written
    assert not hasattr(config, "no_such_entry")
    assert not hasattr(CareMlaConfig(text_config={"model_type": "qwen2"}), "head_dim")  # as the source's


@torch.no_grad()
def test_resized_embeddings_are_saved_and_loaded(converted: Callable[[str], Path], tmp_path: Path) -> None:
    model = care_mla.load(converted("joint"))
    model.resize_token_embeddings(310)
    assert model.config.vocab_size == model.config.text_config.vocab_size == 310
    model.save_pretrained(tmp_path)
    ids = torch.arange(3, 13)[None]
    again = care_mla.load(tmp_path)
    assert again.config.vocab_size == 310 and torch.equal(again(ids).logits, model(ids).logits)


def test_an_entry_that_contradicts_the_source_is_refused(converted: Callable[[str], Path], tmp_path: Path) -> None:
    config = json.loads((converted("joint") / "config.json").read_text())
    assert CareMlaConfig(**{**config, "vocab_size": 300}).vocab_size == 300
    with pytest.raises(CheckpointError, match="text_config has vocab_size = 300, and another"):
        CareMlaConfig(**{**config, "vocab_size": 301})


def test_what_transformers_is_given_stays_as_it_was() -> None:
    """Its classes write into the objects inside, and a source's config.json is copied into the converted one."""
    config = json.loads((Path(__file__).parents[1] / "golden" / "configs" / "llama-3.1-8b.json").read_text())
    before = copy.deepcopy(config)
    care_mla.modeling.require_buildable(config)
    care_mla.modeling.rotary_frequencies(config)
    assert config == before


def test_a_weight_of_another_shape_is_named(tiny: Callable[..., Path]) -> None:
    source = tiny()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "intermediate_size": 72}))
    with pytest.raises(
        CheckpointError, match=r"mlp.down_proj.weight has shape \(48, 64\), config.json asks for \(48, 72\)"
    ):
        care_mla.load(source)
