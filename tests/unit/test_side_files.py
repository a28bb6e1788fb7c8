"""What travels with a checkpoint, and what describes the source's storage alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from care_mla.checkpoint import copy_side_files

TRAVEL = [
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "merges.txt",
    "spiece.model",
    "LICENSE",
    "additional_chat_templates/rag.jinja",
    "chat_templates/tool_use.jinja",
]
STAY = [
    "config.json",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "consolidated.safetensors.index.json",
    "consolidated.00.json",
    "params.json",
    "trainer_state.json",
    "adapter_config.json",
    "quantize_config.json",
    "hf_quant_config.json",
    "model.safetensors",
    "modeling_x.py",
    "care_manifest.json",
    "checkpoint-100/tokenizer.json",
    "additional_chat_templates/weights.bin",
]


@pytest.mark.parametrize("linked", [False, True], ids=["files", "links, as in the hub's cache"])
def test_what_travels(tmp_path: Path, linked: bool) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    for number, name in enumerate([*TRAVEL, *STAY]):
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = tmp_path / f"blob{number}" if linked else path
        content.write_text(name)
        if linked:
            path.symlink_to(content)
    assert sorted(copy_side_files(source, target)) == sorted(TRAVEL)
    found = [path for path in target.rglob("*") if path.is_file()]
    assert sorted(str(path.relative_to(target)) for path in found) == sorted(TRAVEL)
    assert all(not path.is_symlink() and path.read_text() == str(path.relative_to(target)) for path in found)
