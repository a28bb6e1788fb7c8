"""Reading and writing checkpoints: lazy shards in, atomic sharded directories out, never pickle."""

from typing import TYPE_CHECKING

from care_mla.lazy import on_first_use

if TYPE_CHECKING:
    from care_mla.checkpoint.outputs import Kind, claim, locked, require_output, scratch, workspace
    from care_mla.checkpoint.reader import CheckpointReader
    from care_mla.checkpoint.side_files import copy_side_files
    from care_mla.checkpoint.source import at_revision, resolve_source
    from care_mla.checkpoint.writer import ShardedWriter

on_first_use(
    __name__,
    {
        "care_mla.checkpoint.outputs": ("Kind", "claim", "locked", "require_output", "scratch", "workspace"),
        "care_mla.checkpoint.reader": ("CheckpointReader",),
        "care_mla.checkpoint.side_files": ("copy_side_files",),
        "care_mla.checkpoint.source": ("at_revision", "resolve_source"),
        "care_mla.checkpoint.writer": ("ShardedWriter",),
    },
)
