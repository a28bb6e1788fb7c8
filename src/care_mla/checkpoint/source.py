"""SOURCE: a local HF directory or a hub id, NAME or NAME@REVISION."""

from __future__ import annotations

import errno
import os
import stat
from glob import escape
from pathlib import Path
from typing import Any

from care_mla.checkpoint.side_files import FOLDERS, side_files
from care_mla.checkpoint.storage import require_no_adapter
from care_mla.errors import CheckpointError, ConfigError, ConversionError
from care_mla.files import read_json

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
DOWNLOADED = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "LICENSE*", "NOTICE*")
"""What is asked of the hub beside the weights: no .bin (pickle), no code. Signs of an adapter come along, and are refused."""
NOT_DOWNLOADED = ("*/*", "*.index.json", "trainer_state.json")
"""Of these: folders of other formats and of training runs, indices of other weights."""


def model_files(directory: Path) -> list[Path]:
    """Which files of a directory make the model: config.json, side files and the weights that transformers loads, once.

    Raises:
        CheckpointError: a damaged index.
    """
    weights = [WEIGHTS] if (directory / WEIGHTS).is_file() else [INDEX, *shards(directory)]
    names = sorted({CONFIG, *side_files(directory), *weights})
    return [directory / name for name in names if (directory / name).is_file()]


def shards(directory: Path) -> list[str]:
    """Files that the index of a directory names; none without an index, or beside a model.safetensors, which transformers prefers.

    Raises:
        CheckpointError: a damaged index.
    """
    if (directory / WEIGHTS).is_file() or not (directory / INDEX).is_file():
        return []
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(map(_is_plain_name, weight_map.values())):
        raise CheckpointError(f"{directory / INDEX} has no weight_map of names of weights and of files beside it")
    return sorted(set(weight_map.values()))


def at_revision(source: str, revision: str | None) -> str:
    """SOURCE and --revision in one string, which manifests keep.

    Raises:
        ConfigError: a revision of something local, or a second one.
    """
    if revision is None:
        return source
    if _kind(_path(source)) is not None:
        raise ConfigError(f"--revision {revision}: {source} is a local path; a revision is one of a hub id")
    if "@" in source:
        raise ConfigError(f"--revision {revision}: {source} names a revision already; give one")
    if not revision:
        raise ConfigError("--revision is empty; give a branch, a tag or a commit")
    return f"{source}@{revision}"


def resolve_source(source: str | Path, *, config_only: bool = False) -> Path:
    """A local directory for SOURCE, downloading a hub snapshot where needed.

    Args:
        source: a directory, or a hub id with or without @REVISION.
        config_only: download config.json alone.

    Raises:
        CheckpointError: neither a directory with config.json nor a reachable hub id, or one with an adapter.
    """
    path, name = _path(source), str(source)
    kind = _kind(path)
    if kind == "directory":
        require_no_adapter(path)
        if _kind(path / CONFIG) != "file":
            raise CheckpointError(f"{path} has no config.json; a SOURCE is a Hugging Face model directory or a hub id")
        return path
    if kind == "file":
        raise CheckpointError(f"{path} is a file; turn a GGUF file into a model directory first: care fetch {path} DIR")
    repository, _, revision = name.partition("@")
    if revision and _kind(_path(repository)) is not None:
        raise CheckpointError(f"{name}: {repository} is a local path; a revision is one of a hub id")
    if path.is_absolute() or name.startswith((".", "~")) or repository.count("/") > 1 or name.endswith("/"):
        raise CheckpointError(f"{source} does not exist")
    return _download(repository, revision or None, config_only=config_only)


def existing_file(name: str | Path) -> Path:
    """A file that is there.

    Raises:
        CheckpointError: it is not, or cannot be looked at.
    """
    path = _path(name)
    if _kind(path) != "file":
        raise CheckpointError(f"{path} is a directory" if _kind(path) else f"{path} does not exist")
    return path


def _path(source: str | Path) -> Path:
    """
    Raises:
        CheckpointError: no path could have this name.
    """
    name = str(source)
    if not name:
        raise CheckpointError("SOURCE is empty; give a Hugging Face model directory or a hub id")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        shown = os.fsencode(name).decode(errors="backslashreplace")
        raise CheckpointError(f"{shown} is no UTF-8, so it cannot be written into a manifest; rename it") from error
    if "\0" in name:
        raise CheckpointError(f"{name!r} has a zero byte, which no path has")
    try:
        return Path(source).expanduser()
    except RuntimeError as error:
        raise CheckpointError(f"{name}: there is no such user, whose home ~ would be") from error


def _kind(path: Path) -> str | None:
    """ "directory", "file", or None where nothing is.

    Raises:
        CheckpointError: it cannot be told.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ENOTDIR and not path.is_absolute() and len(path.parts) == 2:
            return None  # org/name of the hub, where a file "org" happens to be
        raise CheckpointError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}") from error
    return "directory" if stat.S_ISDIR(mode) else "file"


def _is_plain_name(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name and "\\" not in name


def _download(repository: str, revision: str | None, *, config_only: bool) -> Path:
    """
    Raises:
        CheckpointError: why the hub does not serve it.
    """
    from huggingface_hub import snapshot_download

    def get(patterns: list[str], at: str | None, besides: list[str] | None = None) -> Path:
        return Path(snapshot_download(repository, revision=at, allow_patterns=patterns, ignore_patterns=besides))

    try:
        directory = get([CONFIG] if config_only else [*DOWNLOADED], revision, [*NOT_DOWNLOADED])
        if not (directory / CONFIG).is_file():
            raise CheckpointError(
                f"{repository} has no config.json on the Hugging Face hub; it is no model of transformers"
            )
        if not config_only:
            at = directory.name  # the commit: a branch may move between two downloads
            get([f"{folder}/*.jinja" for folder in FOLDERS], at)
            get([WEIGHTS, INDEX], at)
            if names := shards(directory):
                get([escape(name) for name in names], at)
        require_no_adapter(directory)
        return directory
    except ConversionError:
        raise
    except Exception as error:  # the client, its transports and the disk each have errors of their own
        raise CheckpointError(_hub_reason(repository, revision, error)) from error


def _hub_reason(repository: str, revision: str | None, error: Exception) -> str:
    from huggingface_hub import constants, errors

    name = repository if revision is None else f"{repository}@{revision}"
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{name} is gated: accept its terms on https://huggingface.co/{repository}, and log in with `hf auth login`"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repository} has no revision {revision or 'main'!r} on the Hugging Face hub"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{name} is neither a local directory nor a model on the Hugging Face hub; a private one needs `hf auth login`"
    if isinstance(error, errors.HFValidationError):
        return f"{name} is neither a local directory nor a hub id such as org/name"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hugging Face hub cannot be reached"
        return f"{name} is no local directory, {why}, and no earlier download of it is complete"
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return f"{name} cannot be downloaded from the Hugging Face hub: {reason}"
