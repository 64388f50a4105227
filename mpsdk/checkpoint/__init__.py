"""Checkpoints: sharded safetensors with a digest for every chunk, readable by any layout of any framework.

The format is specified in docs/checkpoint-format.md.
"""

from mpsdk.checkpoint.commit import commit
from mpsdk.checkpoint.convert import convert
from mpsdk.checkpoint.manifest import Manifest
from mpsdk.checkpoint.names import find, step_directory
from mpsdk.checkpoint.reader import Checkpoint
from mpsdk.checkpoint.retention import latest_verified, prune, remove_leftovers
from mpsdk.checkpoint.summary import Summary
from mpsdk.checkpoint.writer import write_rank

__all__ = [
    "Checkpoint",
    "Manifest",
    "Summary",
    "commit",
    "convert",
    "find",
    "latest_verified",
    "prune",
    "remove_leftovers",
    "step_directory",
    "write_rank",
]
