"""Reading and writing checkpoints: lazy shards in, atomic sharded directories out, never pickle."""

from care_mla.checkpoint.reader import CheckpointReader
from care_mla.checkpoint.source import at_revision, resolve_source
from care_mla.checkpoint.writer import ShardedWriter, atomic_directory, copy_side_files

__all__ = ["CheckpointReader", "ShardedWriter", "at_revision", "atomic_directory", "copy_side_files", "resolve_source"]
