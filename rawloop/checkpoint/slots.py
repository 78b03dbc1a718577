"""Where checkpoints lie in a run folder, which one is the newest whole one, and what dead saves have left behind.

Everything that looks is free of side effects, so it may look into the folder of a run that is being trained.
Names that begin with a dot are never checkpoints: `.tmp-` is being written, `.trash-` is being deleted, `.old-` is a
slot moved aside for the moment in which another takes its place.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from rawloop.checkpoint.disk import remove_tree, replace_text, sync
from rawloop.checkpoint.manifest import Manifest, read_manifest, step_of, verify
from rawloop.errors import CheckpointError

CHECKPOINTS = "checkpoints"
BEST = "best"
DISCARDED = "discarded"
LEFTOVER = re.compile(r"\.(tmp|trash|old)-(step-\d+|best|best\.json|metrics\.jsonl)")


class Latest(NamedTuple):
    """The newest whole checkpoint of a run, and the newer ones that are not whole, each with the reason."""

    slot: Path | None
    damaged: dict[Path, str]


def slot_name(step: int) -> str:
    """Return the folder name of a step's slot."""
    return f"step-{step:08d}"


def is_slot_name(slot: Path) -> bool:
    """Whether a folder has the name of a slot, so that one without a manifest is damaged and not something else."""
    return step_of(slot) >= 0 or slot.name in (BEST, f".old-{BEST}")


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


def find_best(run: Path) -> Path | None:
    """Return the best slot of a run, if there is one."""
    for path in (run / BEST, run / f".old-{BEST}"):
        if path.is_dir():
            return path
    return None


def readable_best(run: Path) -> Path | None:
    """Return the best slot if its manifest can be read: one to advise to go on from."""
    slot = find_best(run)
    return slot if slot is not None and _manifest(slot) is not None else None


def note_best(run: Path) -> Manifest | None:
    """Make `best.json` say what the manifest of the best slot says. Returns that manifest, None without a best slot.

    Raises:
        CheckpointError: the best slot has no readable manifest.
    """
    slot = find_best(run)
    if slot is None:
        return None
    manifest = read_manifest(slot)
    if not isinstance(manifest.meta.get("best"), dict):
        raise CheckpointError(f"{slot}: its manifest does not say of which evaluation it is the best: it was put there")
    text = json.dumps({**manifest.meta["best"], "folder": BEST}, indent=1) + "\n"
    path = run / "best.json"
    if not path.exists() or path.read_bytes() != text.encode():
        replace_text(path, text)
    return manifest


def kept_best(run: Path) -> dict[str, Any] | None:
    """What the manifest of the best slot says of it: metric, mode, value and step; None without a readable one."""
    slot = find_best(run)
    manifest = _manifest(slot) if slot is not None else None
    best = manifest.meta.get("best") if manifest is not None else None
    return dict(best) if best else None


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


def put_in_place(temporary: Path, slot: Path, gives_up: bool = False) -> None:
    """Give a finished folder its final name; a slot of that name is removed only after that, or set aside.

    `gives_up` says that it is of another continuation, and so not surpassed. It is set aside at once: of a name beside
    the new one, the next start would not know that. Killed at any point, the one or the other is there, whole.
    A link in its place is removed: nothing is written where it leads.
    """
    if slot.is_symlink():
        slot.unlink()
    old = slot.with_name(f".old-{slot.name}")
    if slot.exists():
        if old.exists():
            _retire(old, slot)
        old = slot.rename(_place_aside(slot, _manifest(slot)) if gives_up else old)
    try:
        temporary.rename(slot)
    except OSError:
        if old.exists():
            old.rename(slot)
        raise
    sync(slot.parent)
    if old.exists() and old.parent == slot.parent:
        _retire(old, slot)


def _retire(old: Path, successor: Path) -> Path | None:
    """Delete a slot that has been replaced, or move it to the discarded, and return where it is then.

    It is moved if it is not surpassed, as when a run goes on from an earlier checkpoint than its last, or if its
    manifest cannot be read: its weights may be what somebody looks for.
    """
    manifest = _manifest(old)
    if manifest and _surpassed(manifest, _manifest(successor)):
        remove_tree(old)
        return None
    return old.rename(_place_aside(successor, manifest))


def _place_aside(slot: Path, manifest: Manifest | None) -> Path:
    """Return a free name among the discarded for what has, or had, the name of `slot`."""
    discarded = _run_of(slot) / CHECKPOINTS / DISCARDED
    discarded.mkdir(parents=True, exist_ok=True)
    name = f"{BEST}-{slot_name(manifest.step)}" if slot.name == BEST and manifest else slot.name
    return _free_name(discarded / name)


def _manifest(slot: Path) -> Manifest | None:
    try:
        return read_manifest(slot)
    except CheckpointError:
        return None


def _surpassed(old: Manifest, successor: Manifest | None) -> bool:
    """Whether nothing is lost with `old`: its value is reached, or, of what has none, its step."""
    if successor is None:
        return False
    then, now = old.meta.get("best"), successor.meta.get("best")
    if not then or not now:
        return old.step <= successor.step
    if (then["metric"], then.get("mode")) != (now["metric"], now.get("mode")):
        return False
    return bool(then["value"] <= now["value"] if now.get("mode") == "max" else then["value"] >= now["value"])


def _run_of(slot: Path) -> Path:
    return slot.parent.parent if slot.parent.name == CHECKPOINTS else slot.parent


def clean_up(run: Path) -> list[str]:
    """Remove what dead saves have left and finish interrupted replacements. Returns a sentence for each.

    Only for the process that trains: in any other, the leftovers might be a save in progress.
    """
    done = []
    for folder in (run, run / CHECKPOINTS):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if LEFTOVER.fullmatch(path.name):
                done.append(_settle(path))
    return done


def _settle(path: Path) -> str:
    target = path.with_name(path.name.removeprefix(".old-"))
    if path.name.startswith(".old-") and not target.exists():
        path.rename(target)
        return f"put {target.name} back: it was being replaced when the run ended"
    if path.name.startswith(".old-"):
        kept = _retire(path, target)
        if kept:
            return f"moved {path.name}, left by a run that ended while saving, to {kept}"
    elif path.is_dir():
        remove_tree(path)
    else:
        path.unlink()
    return f"removed {path.name}, left by a run that ended while saving"


def set_aside(run: Path, after: int) -> list[Path]:
    """Move slots of steps later than `after` to `checkpoints/discarded/`: of a continuation that was given up.

    Left in place, the next `--resume latest` would take one of them for the newest.
    """
    moved = []
    for slot in find_slots(run):
        if step_of(slot) > after:
            moved.append(_free_name(run / CHECKPOINTS / DISCARDED / slot.name))
            moved[-1].parent.mkdir(exist_ok=True)
            slot.rename(moved[-1])
    return moved


def _free_name(path: Path) -> Path:
    number = 1
    free = path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def rotate(run: Path, step: int, keep_last: int, keep_every: int = 0) -> list[Path]:
    """Delete the oldest slots so that `keep_last` remain, the one of `step` among them. Returns the deleted ones.

    Slots that `is_kept` says of are neither deleted nor counted, by the `keep_every` of today or of when they were
    written.
    """
    if keep_last == 0:
        return []
    counted = [slot for slot in find_slots(run) if not is_kept(step_of(slot), keep_every) and not _marked(slot)]
    surplus = [slot for slot in counted if step_of(slot) <= step][keep_last:]
    for slot in surplus:
        remove_tree(slot)
    return surplus


def is_kept(step: int, keep_every: int) -> bool:
    """Whether the checkpoint of a step is one of those that are kept for ever; 0 sets none apart."""
    return keep_every > 0 and step > 0 and step % keep_every == 0


def _marked(slot: Path) -> bool:
    manifest = _manifest(slot)
    return manifest is not None and bool(manifest.meta.get("keep"))
