"""SOURCE: a local HF directory or a hub id."""

from __future__ import annotations

from pathlib import Path

from care_mla.checkpoint.storage import require_no_adapter
from care_mla.errors import CheckpointError

HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "LICENSE*"]
"""What is downloaded: no .bin (pickle), no code."""


def resolve_source(source: str | Path, *, config_only: bool = False) -> Path:
    """A local directory for SOURCE, downloading a hub snapshot where needed.

    Raises:
        CheckpointError: neither a directory with config.json nor a reachable hub id, or one with an adapter.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        require_no_adapter(path)
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path} has no config.json; a SOURCE is a Hugging Face model directory or a hub id")
        return path
    if path.is_file():
        raise CheckpointError(f"{path} is a file; turn a GGUF file into a model directory first: care fetch {path} DIR")
    name = str(source)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise CheckpointError(f"{source} does not exist")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        snapshot = Path(snapshot_download(name, allow_patterns=["*.json"] if config_only else HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{name} is neither a local directory nor a model that the Hugging Face hub would serve: {reason}"
        ) from error
    require_no_adapter(snapshot)
    return snapshot
