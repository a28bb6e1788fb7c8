"""What travels with a checkpoint: tokenizer, chat templates, generation settings, licence."""

from __future__ import annotations

import re
from pathlib import Path

from care_mla.checkpoint.storage import ADAPTER_FILES, QUANTIZATION_FILES
from care_mla.files import copy_file, writing

SUFFIXES = {".json", ".jinja", ".model", ".txt", ".tiktoken"}
FOLDERS = ("additional_chat_templates", "chat_templates")
"""Folders that tokenizers read; others hold models, checkpoints or logs of their own."""

_OF_THE_SOURCE_ALONE = {
    "config.json",
    "params.json",
    "trainer_state.json",
    "training_args.json",
    "all_results.json",
    "train_results.json",
    "eval_results.json",
    *ADAPTER_FILES,
    *QUANTIZATION_FILES,
}
_DESCRIBES_STORAGE = re.compile(r"\.index\.json$|^consolidated|^recipe\.|^(dtypes|device_map)\.json$", re.IGNORECASE)


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Carry tokenizer, chat templates, generation config and licence over; never weights or what describes them, never code.

    Links, of which the hub's cache is made, are copied as the files that they point to.

    Returns:
        What was copied, relative to the source.
    """
    inside = [path for name in FOLDERS if (source / name).is_dir() for path in (source / name).rglob("*")]
    copied = []
    for path in sorted([*source.iterdir(), *inside]):
        if not path.is_file() or not _travels(path.name):
            continue
        name = path.relative_to(source)
        with writing(target / name):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
        copy_file(path, target / name)
        copied.append(str(name))
    return copied


def _travels(name: str) -> bool:
    wanted = Path(name).suffix.lower() in SUFFIXES or name.upper().startswith(("LICENSE", "NOTICE"))
    own = name in _OF_THE_SOURCE_ALONE or name.startswith("care_") or _DESCRIBES_STORAGE.search(name)
    return wanted and not own
