"""Reading and writing checkpoints: lazy shards in, atomic sharded directories out, never pickle."""

from care_mla.checkpoint.outputs import Kind, claim, locked, require_output, scratch
from care_mla.checkpoint.reader import CheckpointReader
from care_mla.checkpoint.side_files import copy_side_files
from care_mla.checkpoint.source import at_revision, resolve_source
from care_mla.checkpoint.writer import ShardedWriter

__all__ = [
    "CheckpointReader",
    "Kind",
    "ShardedWriter",
    "at_revision",
    "claim",
    "copy_side_files",
    "locked",
    "require_output",
    "resolve_source",
    "scratch",
]
