"""Checkpoints that are whole or not there: `CheckpointManager` and what belongs to it."""

from typing import TYPE_CHECKING

from rawloop.lazy import importer

if TYPE_CHECKING:
    from rawloop.checkpoint.best import BestRecord, BestTracker
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
else:
    __getattr__ = importer(
        __name__,
        {
            "BestRecord": "rawloop.checkpoint.best",
            "BestTracker": "rawloop.checkpoint.best",
            "CheckpointConfig": "rawloop.checkpoint.manager",
            "CheckpointManager": "rawloop.checkpoint.manager",
            "Latest": "rawloop.checkpoint.slots",
            "Manifest": "rawloop.checkpoint.manifest",
            "Restored": "rawloop.checkpoint.manager",
            "RunLock": "rawloop.checkpoint.run_folder",
            "claim_run_folder": "rawloop.checkpoint.run_folder",
            "find_best": "rawloop.checkpoint.slots",
            "find_latest": "rawloop.checkpoint.slots",
            "find_slots": "rawloop.checkpoint.slots",
            "lock_run_folder": "rawloop.checkpoint.run_folder",
            "mark_launch": "rawloop.checkpoint.run_folder",
            "read_manifest": "rawloop.checkpoint.manifest",
            "remove_stop_file": "rawloop.checkpoint.run_folder",
            "verify": "rawloop.checkpoint.manifest",
            "where_to_begin": "rawloop.checkpoint.run_folder",
        },
    )

__all__ = [
    "BestRecord",
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
