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
    copied = []
    for name in side_files(source):
        with writing(target / name):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
        copy_file(source / name, target / name)
        copied.append(name)
    return copied


def side_files(directory: Path) -> list[str]:
    """Names below a directory of what travels with its checkpoint."""
    inside = [path for name in FOLDERS if (directory / name).is_dir() for path in (directory / name).rglob("*")]
    names = [path.relative_to(directory).as_posix() for path in [*directory.iterdir(), *inside] if path.is_file()]
    return sorted(name for name in names if is_side_file(name))


def is_side_file(name: str) -> bool:
    """Whether a file of a model directory, by its name there, travels with the checkpoint."""
    folder, _, last = name.rpartition("/")
    if folder and folder.partition("/")[0] not in FOLDERS:
        return False
    wanted = Path(last).suffix.lower() in SUFFIXES or last.upper().startswith(("LICENSE", "NOTICE"))
    own = last in _OF_THE_SOURCE_ALONE or last.startswith("care_") or _DESCRIBES_STORAGE.search(last)
    return wanted and not own
