"""The checkpoint of a healed model: the model's own, with the trained weights in place of what they were."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from care_mla.checkpoint import ShardedWriter, copy_side_files
from care_mla.errors import CheckpointError
from care_mla.files import copy_file, write_json
from care_mla.healing.pair import Pair
from care_mla.records.artifacts import EXPORT, HEALING, MANIFEST, METRICS, SPECTRA
from care_mla.records.healing import HealingRecord


def write_healed(
    directory: Path, pair: Pair, weights: dict[str, Tensor], record: HealingRecord, *, metrics: Path
) -> None:
    """Weights, records and what travels with them.

    Args:
        directory: empty.
        weights: what was trained, under the names of the checkpoint; stored in the dtypes that these had.

    Raises:
        CheckpointError: the checkpoint has no tensor of that name, or it cannot be written.
    """
    if absent := weights.keys() - set(pair.reader.names):
        raise CheckpointError(f"{pair.directory} has no {min(absent)}, which was trained ({len(absent)} such)")
    writer = ShardedWriter(directory)
    for name in pair.reader.names:
        tensor = pair.reader[name]
        writer.add(name, weights[name].to(tensor.dtype) if name in weights else tensor)
    writer.finish()
    copy_side_files(pair.directory, directory)
    copy_file(pair.directory / "config.json", directory / "config.json")
    copy_file(metrics, directory / METRICS)
    write_json(directory / HEALING, record.to_dict())
    if (pair.directory / EXPORT).is_file():
        copy_file(pair.directory / EXPORT, directory / EXPORT)
    if (pair.directory / MANIFEST).is_file():
        earlier = pair.record.get("healing", [])
        write_json(directory / MANIFEST, {**pair.record, "healing": [*earlier, record.to_dict()]})
        copy_file(pair.directory / SPECTRA, directory / SPECTRA)
