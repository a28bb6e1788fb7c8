"""A converted or exported model and its teacher, as they lie on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from care_mla.checkpoint import CheckpointReader, resolve_source
from care_mla.errors import CheckpointError, ConfigError
from care_mla.files import read_json
from care_mla.healing.student import family_of
from care_mla.modeling import require_loadable, take_inventory
from care_mla.records.artifacts import EXPORT, MANIFEST
from care_mla.text import load_tokenizer


@dataclass(frozen=True)
class Pair:
    """A model that can be healed, and its teacher; weights not yet read.

    Attributes:
        name: of the model, as the record says it.
        record: its manifest, or what `care export` wrote; empty without either.
        teacher: under the names that transformers gives its weights, however they are stored.
    """

    name: str
    directory: Path
    reader: CheckpointReader
    record: dict[str, Any]
    teacher_name: str
    teacher: CheckpointReader


def open_pair(model: str | Path, teacher: str | Path | None, name: str | None) -> Pair:
    """Find model, teacher and their records, and check that they belong together.

    Args:
        teacher: None: what the model was converted from.

    Raises:
        ConversionError
    """
    directory = resolve_source(model)
    reader = CheckpointReader(directory)
    family_of(reader.config)
    require_loadable(directory)
    record = next((read_json(directory / f) for f in (MANIFEST, EXPORT) if (directory / f).is_file()), {})
    teacher_name = str(teacher) if teacher is not None else _teacher_of(record, directory)
    try:
        teacher_directory = resolve_source(teacher_name)
    except CheckpointError as error:
        if teacher is not None:
            raise
        raise CheckpointError(
            f"{teacher_name}, from which {directory} was converted, is not found from here; name it with --teacher"
        ) from error
    teacher_reader = CheckpointReader(teacher_directory)
    require_loadable(teacher_directory)
    vocabularies = [(r.config.get("text_config") or r.config).get("vocab_size") for r in (reader, teacher_reader)]
    if vocabularies[0] != vocabularies[1]:
        raise ConfigError(
            f"the teacher {teacher_name} has a vocabulary of {vocabularies[1]}, {directory} one of {vocabularies[0]}; the teacher must be the model that was converted, or one with its tokenizer"
        )
    if load_tokenizer(directory).get_vocab() != load_tokenizer(teacher_directory).get_vocab():
        raise ConfigError(
            f"the teacher {teacher_name} has another tokenizer than {directory}; the same ids mean other tokens there"
        )
    return Pair(name or str(model), directory, reader, record, teacher_name, _as_loaded(teacher_reader))


def _teacher_of(record: dict[str, Any], directory: Path) -> str:
    """The source that a manifest names; of an export, that of the model it was made from."""
    source = record.get("source")
    if isinstance(source, str):  # an export names the converted directory
        manifest = Path(source) / MANIFEST
        source = read_json(manifest).get("source") if manifest.is_file() else None
    if not isinstance(source, dict):
        raise ConfigError(f"{directory} does not say what it was converted from; name its --teacher")
    return str(source["name"])


def _as_loaded(reader: CheckpointReader) -> CheckpointReader:
    """A checkpoint under the names that transformers gives its weights: a base model's have no prefix on disk."""
    shapes = {name: tensor.shape for name, tensor in reader.stored.items()}
    return reader.renamed(take_inventory(reader.directory, shapes).names)
