"""Reading and writing checkpoints: lazy shards in, atomic sharded directories out, never pickle."""

from care_mla.checkpoint.reader import CheckpointReader
from care_mla.checkpoint.side_files import copy_side_files
from care_mla.checkpoint.source import resolve_source
from care_mla.checkpoint.writer import ShardedWriter, atomic_directory

__all__ = ["CheckpointReader", "ShardedWriter", "atomic_directory", "copy_side_files", "resolve_source"]
