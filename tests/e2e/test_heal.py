"""`care heal` as a whole: what it trains, what it leaves, and what it says where it cannot."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import care_mla
from care_mla.config import HealSettings
from care_mla.errors import ConversionError, HealingError
from care_mla.healing import loop
from care_mla.pipeline import convert_and_heal

IDS = torch.randint(3, 259, (2, 24), generator=torch.Generator().manual_seed(5))
STEPS, BATCH_SIZE, SEQLEN = 6, 4, 32
Converted = Callable[[str], Path]
Heal = Callable[..., dict[str, Any]]


@pytest.fixture
def settings(text_file: Path) -> dict[str, Any]:
    """Six steps, evaluated after every second."""
    return {
        "data": str(text_file), "tokens": STEPS * BATCH_SIZE * SEQLEN, "batch_size": BATCH_SIZE, "seqlen": SEQLEN,
        "lr": 3e-3, "eval_blocks": 2, "eval_every": 2, "precision": "float32", "device": "cpu",
    }  # fmt: skip


@pytest.fixture
def heal(converted: Converted, settings: dict[str, Any], tmp_path: Path) -> Heal:
    """heal("joint", kl_weight=2) -> record; the model is in tmp_path / "out"."""

    def run(kind: str = "joint", out: str = "out", **changes: Any) -> dict[str, Any]:
        return care_mla.heal(converted(kind), tmp_path / out, **{**settings, **changes})

    return run


def _weights(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") if "spectra" not in path.name
            for name, tensor in load_file(path).items()}  # fmt: skip


def _steps(directory: Path) -> list[dict[str, float]]:
    """Metrics, all but how long things took."""
    lines = [json.loads(line) for line in (directory / "care_heal.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


def _untouched(tmp_path: Path, text_file: Path) -> list[Path]:
    return sorted(tmp_path.rglob("*"))


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", ["kv", "attention", "all"])
@pytest.mark.parametrize("kind", ["joint", "split", "mla", "stock"])
def test_healing_comes_closer_to_the_teacher(
    kind: str, trained: str, heal: Heal, converted: Converted, tmp_path: Path
) -> None:
    record = heal(kind, train=trained)
    assert record["healed"]["kl"] < 0.9 * record["one_shot"]["kl"]
    assert record["teacher"]["shares_weights"] == (kind != "stock" and trained != "all")
    before, after = _weights(converted(kind)), _weights(tmp_path / "out")
    assert {(n, t.shape, t.dtype) for n, t in before.items()} == {(n, t.shape, t.dtype) for n, t in after.items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == record["trained"]["tensors"]
    assert trained == "all" or all("self_attn" in name for name in changed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert care_mla.load(tmp_path / "out")(IDS).logits.isfinite().all()
