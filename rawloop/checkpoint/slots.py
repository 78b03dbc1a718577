"""Where checkpoints lie in a run folder, which one is the newest, and which one `best` points to.

Nothing here has side effects, so it may look into the folder of a run that is being trained; `placing.py` writes.
Names that begin with a dot are never checkpoints: `.tmp-` is being written, `.trash-` is being deleted, `.old-` is a
slot moved aside for the moment in which another takes its place.

`best.json` says which slot is the best, and `best` is a relative link to it. Both are replaced atomically, best.json
first: if they differ, it is right, unless its slot is not there (a kill while a slot was moved).
"""

import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from rawloop.checkpoint.best import BestRecord
from rawloop.checkpoint.manifest import Manifest, read_manifest, step_of, verify
from rawloop.errors import CheckpointError

CHECKPOINTS = "checkpoints"
BEST = "best"
BEST_FILE = "best.json"
DISCARDED = "discarded"
POINTED = re.compile(rf"{CHECKPOINTS}/({DISCARDED}/)?\w[^/]*")  # where `best` may lead


class Latest(NamedTuple):
    """The newest whole checkpoint of a run, and the newer ones that are damaged, each with the reason."""

    slot: Path | None
    damaged: dict[Path, str]


def slot_name(step: int) -> str:
    """Return the folder name of a step's slot."""
    return f"step-{step:08d}"


def is_slot_name(slot: Path) -> bool:
    """Whether a folder has the name of a slot, so that one without a manifest is damaged and not something else."""
    return step_of(slot) >= 0 or slot.name == BEST


def find_slots(run: Path) -> list[Path]:
    """Return the slots of a run by step, newest first, whole or not.

    A slot that a kill caught while it was being replaced is found under its `.old-` name.
    """
    folder = run / CHECKPOINTS
    if not folder.is_dir():
        return []
    slots = {path.name: path for path in folder.iterdir() if step_of(path) >= 0 and path.is_dir()}
    found = [path for name, path in slots.items() if not name.startswith(".old-") or name[5:] not in slots]
    return sorted(found, key=step_of, reverse=True)


def find_latest(run: Path) -> Latest:
    """Look for the newest checkpoint whose every file is as it was written."""
    damaged: dict[Path, str] = {}
    for slot in find_slots(run):
        try:
            verify(slot)
        except CheckpointError as error:
            damaged[slot] = str(error)
            continue
        return Latest(slot, damaged)
    return Latest(None, damaged)


def find_best(run: Path) -> Path | None:
    """Return the slot that `best` points to, if it is there."""
    if is_old_best(run):
        return run / BEST
    for name in (json_of_best(run).get("slot"), link_of_best(run)):
        if isinstance(name, str) and POINTED.fullmatch(name):
            for path in (run / name, (run / name).with_name(f".old-{Path(name).name}")):
                if path.is_dir():
                    return path
    return None


def readable_best(run: Path) -> Path | None:
    """Return the slot that `best` points to if its manifest can be read: one to advise to go on from."""
    slot = find_best(run)
    return slot if slot is not None and manifest_of(slot) is not None else None


def resolve_best(path: Path) -> Path:
    """Return the slot that RUN/best points to, on file systems without links too; any other path as it is."""
    return (find_best(path.parent) if path.name == BEST else None) or path


def points_nowhere(run: Path) -> bool:
    """Whether there was a best checkpoint, and is no longer."""
    return find_best(run) is None and ((run / BEST_FILE).exists() or (run / BEST).is_symlink())


def best_record(run: Path) -> BestRecord | None:
    """Return the evaluation for which `best` points to its slot, as the slot's manifest says, or else best.json."""
    slot = find_best(run)
    if slot is None:
        return None
    manifest = manifest_of(slot)
    return BestRecord.read(manifest.meta.get("best") if manifest else None) or BestRecord.read(json_of_best(run))


def is_old_best(run: Path) -> bool:
    """Whether `best` is a slot of its own, as older versions of rawloop wrote it."""
    return (run / BEST).is_dir() and not (run / BEST).is_symlink()


def json_of_best(run: Path) -> dict[str, Any]:
    """Return what best.json says; nothing if it is missing or damaged."""
    try:
        content = json.loads((run / BEST_FILE).read_bytes())
    except (FileNotFoundError, IsADirectoryError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def link_of_best(run: Path) -> str | None:
    """Return where the link leads, as it is written."""
    return os.readlink(run / BEST) if (run / BEST).is_symlink() else None


def manifest_of(slot: Path) -> Manifest | None:
    """Return a slot's manifest; None if it cannot be read."""
    try:
        return read_manifest(slot)
    except CheckpointError:
        return None
