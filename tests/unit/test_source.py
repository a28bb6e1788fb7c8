"""SOURCE: paths that are none, hub ids with and without a revision, and which files of a repository are a model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import errors

from care_mla.checkpoint import CheckpointReader, at_revision, resolve_source
from care_mla.errors import CheckpointError, ConfigError
from care_mla.pipeline import fetch

EXTRA = (
    "consolidated.safetensors",
    "original/model.safetensors",
    "original/params.json",
    "checkpoint-500/model.safetensors",
    "checkpoint-500/config.json",
    "onnx/model.onnx",
    "model.fp16.safetensors",
    "model.fp16.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "modeling_own.py",
    ".gitattributes",
)
MODEL = ("config.json", "tokenizer.json", "additional_chat_templates/tools.jinja")
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


class Hub:
    """A repository, and what was downloaded of it into a cache."""

    def __init__(self, directory: Path, names: tuple[str, ...]):
        self.snapshot = directory / "snapshots" / ("0" * 40)
        self.snapshot.mkdir(parents=True)
        self.names, self.revisions = names, []
        self.error: Exception | None = None

    def snapshot_download(
        self,
        repository: str,
        *,
        revision: str | None = None,
        allow_patterns: list[str],
        ignore_patterns: list[str] | None = None,
    ) -> str:
        self.revisions.append(revision)
        if self.error is not None:
            raise self.error
        for name in self.names:
            wanted = any(fnmatch(name, pattern) for pattern in allow_patterns)
            if wanted and not any(fnmatch(name, pattern) for pattern in ignore_patterns or []):
                path = self.snapshot / name
                path.parent.mkdir(exist_ok=True)
                path.write_text(json.dumps({"weight_map": dict(zip("ab", SHARDS, strict=True))}))
        return str(self.snapshot)

    @property
    def downloaded(self) -> set[str]:
        return {path.relative_to(self.snapshot).as_posix() for path in self.snapshot.rglob("*") if path.is_file()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Hub]:
    def make(*names: str) -> Hub:
        made = Hub(tmp_path / "hub", names)
        monkeypatch.setattr("huggingface_hub.snapshot_download", made.snapshot_download)
        return made

    return make


def test_shards_of_the_index_are_downloaded_and_no_other_weights(hub: Callable[..., Hub]) -> None:
    there = hub(*MODEL, *EXTRA, *SHARDS, "model.safetensors.index.json")
    assert resolve_source("org/name") == there.snapshot
    assert there.downloaded == {*MODEL, *SHARDS, "model.safetensors.index.json"}


def test_one_file_of_weights_is_downloaded_alone(hub: Callable[..., Hub]) -> None:
    there = hub(*MODEL, *EXTRA, *SHARDS, "model.safetensors")
    resolve_source("org/name")
    assert there.downloaded == {*MODEL, "model.safetensors"}


def test_an_adapter_on_the_hub_is_refused(hub: Callable[..., Hub]) -> None:
    hub(*MODEL, "model.safetensors", "adapter_config.json", "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="holds an adapter"):
        resolve_source("org/name")


def test_config_json_alone(hub: Callable[..., Hub]) -> None:
    there = hub(*MODEL, *EXTRA, *SHARDS)
    resolve_source("org/name", config_only=True)
    assert there.downloaded == {"config.json"}


def test_a_revision_is_part_of_the_name_and_all_downloads_are_of_its_commit(hub: Callable[..., Hub]) -> None:
    there = hub(*MODEL, "model.safetensors")
    resolve_source(at_revision("org/name", "v1.0"))
    assert there.revisions[0] == "v1.0" and set(there.revisions[1:]) == {there.snapshot.name}
    there.revisions.clear()
    resolve_source("org/name")
    assert there.revisions[0] is None


def test_revisions_that_mean_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a local path; a revision is one of a hub id"):
        at_revision(str(tmp_path), "v1")
    with pytest.raises(ConfigError, match="names a revision already"):
        at_revision("org/name@main", "v1")
    with pytest.raises(CheckpointError, match="is a local path; a revision is one of a hub id"):
        resolve_source(f"{tmp_path}@v1")
    assert at_revision("org/name", None) == "org/name"


def _refused(kind: type[errors.HfHubHTTPError]) -> Exception:
    response: Any = SimpleNamespace(headers={}, request=None)
    return kind("no\nsecond line", response=response)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (_refused(errors.GatedRepoError), "org/name@v1 is gated: accept its terms on https://huggingface.co/org/name"),
        (_refused(errors.RevisionNotFoundError), "org/name has no revision 'v1'"),
        (_refused(errors.RepositoryNotFoundError), "a private one needs `hf auth login`"),
        (errors.LocalEntryNotFoundError("x"), "cannot be reached, and no earlier download of it is complete"),
        (errors.OfflineModeIsEnabled("x"), "no earlier download of it is complete"),
        (errors.HFValidationError("x"), "neither a local directory nor a hub id"),
        (RuntimeError("timed out\nat 3"), "cannot be downloaded from the Hugging Face hub: timed out"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_what_the_hub_refuses_is_one_true_sentence(
    error: Exception, says: str, hub: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub().error = error
    with pytest.raises(CheckpointError) as refused:
        resolve_source("org/name@v1")
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_a_repository_without_config_json(hub: Callable[..., Hub]) -> None:
    hub("params.json")
    with pytest.raises(CheckpointError, match="no config.json on the Hugging Face hub"):
        resolve_source("org/name")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "SOURCE is empty"),
        ("/no/such", "does not exist"),
        ("no/such/", "does not exist"),
        ("~nobody-of-this-name/x", "no such user"),
        ("a\0b", "zero byte"),
        ("x" * 300, "name too long"),
        (os.fsdecode(b"mod\xffel"), r"mod\\xffel is no UTF-8"),
        ("FILE/below", "not a directory"),
        ("LOOP", "too many levels of symbolic links"),
        ("LINK", "does not exist"),
    ],
)
def test_paths_that_are_no_source(name: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "FILE").write_text("")
    (tmp_path / "LOOP").symlink_to(tmp_path / "LOOP")
    (tmp_path / "LINK").symlink_to(tmp_path / "nowhere")
    source = str(tmp_path / name) if name.isupper() or name.startswith("FILE") else name
    for config_only in (False, True):
        with pytest.raises(CheckpointError, match=says):
            resolve_source(source, config_only=config_only)


@pytest.mark.parametrize("name", ["x" * 300 + ".gguf", "a\0.gguf", "/no/such.gguf"])
def test_paths_that_are_no_gguf_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="name too long|zero byte|does not exist"):
        fetch(name, tmp_path / "out")


def test_the_command_keeps_the_revision_in_the_name(
    hub: Callable[..., Hub], care: Callable[..., str], tiny: Callable[..., Path]
) -> None:
    there, source = hub("config.json"), tiny()
    there.snapshot_download("org/name", allow_patterns=["config.json"])
    (there.snapshot / "config.json").write_bytes((source / "config.json").read_bytes())
    there.names = ()
    assert "org/name@v1" in care("inspect", "org/name", "--revision", "v1")
    assert there.revisions[-1] == "v1"


def test_directories_however_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "model")
    for name in (".", "../model/", "~/model", str(tmp_path / "model") + "/"):
        assert resolve_source(name).samefile(tmp_path / "model")


def test_a_directory_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Path, **_: object) -> os.stat_result:
        if self.name == "config.json":
            raise PermissionError(13, "Permission denied")
        return SimpleNamespace(st_mode=0o040000)  # type: ignore[return-value]

    monkeypatch.setattr(Path, "stat", denied)
    with pytest.raises(CheckpointError, match=r"config.json cannot be read: permission denied"):
        resolve_source(tmp_path)


def test_fetch_copies_what_is_the_model_and_nothing_else(tiny: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny()
    for name in (*EXTRA, "additional_chat_templates/tools.jinja"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("{}")
    fetch(str(source), tmp_path / "out")
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert not found & set(EXTRA)
    assert {"config.json", "model.safetensors", "tokenizer.json", "additional_chat_templates/tools.jinja"} <= found
    assert CheckpointReader(tmp_path / "out").fingerprint == CheckpointReader(source).fingerprint
