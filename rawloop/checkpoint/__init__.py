"""Checkpoints that are whole or not there: `CheckpointManager` and what belongs to it."""

from rawloop.checkpoint.best import BestTracker
from rawloop.checkpoint.manager import CheckpointConfig, CheckpointManager, Restored
from rawloop.checkpoint.manifest import Manifest, read_manifest, verify
from rawloop.checkpoint.run_folder import (
    RunLock,
    claim_run_folder,
    lock_run_folder,
    mark_launch,
    remove_stop_file,
    where_to_begin,
)
from rawloop.checkpoint.slots import Latest, find_best, find_latest, find_slots

__all__ = [
    "BestTracker",
    "CheckpointConfig",
    "CheckpointManager",
    "Latest",
    "Manifest",
    "Restored",
    "RunLock",
    "claim_run_folder",
    "find_best",
    "find_latest",
    "find_slots",
    "lock_run_folder",
    "mark_launch",
    "read_manifest",
    "remove_stop_file",
    "verify",
    "where_to_begin",
]
