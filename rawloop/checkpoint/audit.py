"""Verifies every checkpoint of a run, whole or not. It only reads, so it may run beside the process that trains.

That process deletes and replaces slots meanwhile: damage counts only if the slot is still the same folder afterwards.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rawloop.checkpoint.run_folder import MARKS
from rawloop.checkpoint.slots import (
    BEST,
    CHECKPOINTS,
    DISCARDED,
    MANIFEST,
    Manifest,
    best_is_folder,
    find_slots,
    is_slot_name,
    manifest_of,
    step_of,
    verify,
)
from rawloop.errors import CheckpointError, UserError

UNFINISHED = "being written, or left by a save that was killed; never taken for a checkpoint"
GONE = "deleted or replaced meanwhile"


class Found(NamedTuple):
    """The result for one slot. `manifest` is None if it cannot be read; `seconds` is the time that reading took."""

    slot: Path
    verdict: Literal["whole", "DAMAGED", "unreadable", "unfinished", "gone"]
    reason: str
    seconds: float
    manifest: Manifest | None

    @property
    def step(self) -> int:
        """The step of the slot; -1 if neither its manifest nor its name has one."""
        return self.manifest.step if self.manifest else step_of(self.slot)


def slots_to_examine(folder: Path) -> list[Path]:
    """Return all slots of a run: newest first, then discarded and unfinished ones. Of a slot, return the slot.

    Raises:
        UserError: the folder is neither a run nor a slot.
    """
    try:
        if not folder.is_dir():
            raise UserError(f"'{folder}' is no folder: name a run's folder, or one of its checkpoints")
        if _is_slot(folder):
            return [folder]
        return list(_slots_of_run(folder))
    except OSError as error:
        raise UserError(f"'{folder}' cannot be read: {error.strerror}") from error


def _is_slot(folder: Path) -> bool:
    return (folder / MANIFEST).exists() or (
        is_slot_name(folder) and not any((folder / mark).exists() for mark in MARKS)
    )


def _slots_of_run(run: Path) -> Iterator[Path]:
    if (run.parent / MANIFEST).exists():
        raise UserError(f"'{run}' is a part of a checkpoint: name that, '{run.parent}'")
    if not any((run / mark).exists() for mark in MARKS):
        advice = f": name the run, '{run.parent}'" if run.name == CHECKPOINTS else ", nor a checkpoint"
        raise UserError(f"'{run}' is no run{advice}")
    yield from find_slots(run)
    if best_is_folder(run):
        yield run / BEST
    discarded = run / CHECKPOINTS / DISCARDED
    yield from sorted(path for path in discarded.glob("*") if path.is_dir())
    for folder in (run / CHECKPOINTS, run):
        yield from sorted(path for path in folder.glob(".tmp-*") if path.is_dir())


def examine(slot: Path) -> Found:
    """Check every file of a slot by size and digest."""
    start = time.perf_counter()
    if slot.name.startswith(".tmp-"):
        return Found(slot, "unfinished", UNFINISHED, 0.0, None)
    try:
        found = _look(slot)
    except OSError as error:
        found = Found(slot, "unreadable", f"it cannot be read: {error.strerror}", 0.0, None)
    return found._replace(seconds=time.perf_counter() - start)


def _look(slot: Path) -> Found:
    while True:
        before = _identity(slot)
        if before is None:
            return Found(slot, "gone", GONE, 0.0, None)
        try:
            return Found(slot, "whole", "", 0.0, verify(slot))
        except CheckpointError as error:
            if _identity(slot) == before:
                verdict: Any = "unreadable" if isinstance(error.__cause__, OSError) else "DAMAGED"
                return Found(slot, verdict, str(error).removeprefix(f"{slot}: "), 0.0, manifest_of(slot))


def _identity(slot: Path) -> tuple[int, int, int] | None:
    """Return what changes when another folder takes the name; None if there is no folder."""
    try:
        found = slot.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns
