"""Changes to the slots of a run: puts a finished slot in place, deletes old ones, moves `best`, cleans up after kills.

Only the process that trains into the folder calls these functions. A kill at any point leaves only whole slots under
the names of slots, and `best` points to the old slot or to the new one.
"""

import errno
import json
import re
from itertools import chain, count
from pathlib import Path

from rawloop.checkpoint.best import BestRecord
from rawloop.checkpoint.slots import (
    BEST,
    BEST_FILE,
    CHECKPOINTS,
    DISCARDED,
    best_is_folder,
    best_record,
    find_best,
    find_slots,
    json_of_best,
    link_of_best,
    manifest_of,
    points_nowhere,
    slot_name,
    step_of,
    verify,
)
from rawloop.errors import CheckpointError
from rawloop.files import remove_tree, replace_file, sync

LEFTOVER = re.compile(r"\.(tmp|trash|old)-(step-\d+|best|best\.json|metrics\.jsonl)")
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


def set_best(run: Path, slot: Path, record: BestRecord) -> list[str]:
    """Point `best` to a slot. Returns warnings for the user.

    The previous best becomes an ordinary slot. If its value is better, as after a change of the metric, it is moved to
    `discarded/`, where rotation does not delete it.
    """
    adopt_best(run)
    before, was = find_best(run), best_record(run)
    if before not in (None, slot) and before.parent == run / CHECKPOINTS and not record.reaches(was):
        _move(run, before, _free_place(run, before.name))
    return _point_best(run, slot, record)


def repair_best(run: Path) -> list[str]:
    """Make best.json and the link agree after a kill. Returns warnings for the user."""
    slot = find_best(run)
    if slot is None:
        return [f"{run / BEST} points to a checkpoint that does not exist"] if points_nowhere(run) else []
    record = best_record(run)
    if record is None:
        return [f"{slot}: neither its manifest nor best.json says which evaluation made it the best"]
    warnings = _point_best(run, slot, record)
    if manifest_of(slot) is None:
        warnings.append(f"the best checkpoint, {slot}, is damaged: its manifest cannot be read")
    return warnings


def _point_best(run: Path, slot: Path, record: BestRecord) -> list[str]:
    _write_best(run, slot, record)
    return _link_best(run, slot)


def _write_best(run: Path, slot: Path, record: BestRecord) -> None:
    text = json.dumps({**record._asdict(), "slot": slot.relative_to(run).as_posix()}, indent=1) + "\n"
    path = run / BEST_FILE
    if not path.is_file() or path.read_bytes() != text.encode():
        replace_file(path, text)


def _link_best(run: Path, slot: Path) -> list[str]:
    """Replace the link. On a file system without links, best.json alone names the best slot."""
    name, temporary = slot.relative_to(run).as_posix(), run / f".tmp-{BEST}"
    if link_of_best(run) == name:
        return []
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(name)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        return [f"{run} takes no links ({error.strerror}): {run / BEST_FILE} alone says which checkpoint is the best"]
    temporary.rename(run / BEST)
    sync(run)
    return []


def adopt_best(run: Path) -> list[str]:
    """Replace a folder `best` by a link; see `best_is_folder`. Returns warnings for the user.

    A copy of the best slot is deleted. Any other folder is moved to `discarded/`, and `best` points to it there.
    """
    if not best_is_folder(run):
        return []
    manifest, record = manifest_of(run / BEST), best_record(run)
    slot = run / str(json_of_best(run).get("slot"))
    if record is not None and manifest == manifest_of(slot) and slot.parent != run and _is_whole(slot):
        remove_tree(run / BEST)
        return [f"removed {run / BEST}, a copy of {slot}", *_link_best(run, slot)]
    place = _move(run, run / BEST, _free_place(run, slot_name(manifest.step) if manifest else BEST))
    return [f"moved {run / BEST}, a folder where a link must be, to {place}"]


def _is_whole(slot: Path) -> bool:
    try:
        verify(slot)
    except CheckpointError:
        return False
    return True


def put_in_place(temporary: Path, slot: Path, *, gives_up: bool = False, best: BestRecord | None = None) -> None:
    """Rename a finished folder to its slot's name. An existing slot of that name is deleted afterwards, or moved aside.

    It is moved to `discarded/` if it belongs to another continuation (`gives_up`), if its manifest cannot be read, or
    if `best` points to it and the new slot is no better. A kill at any point leaves one of the two, whole. A link of
    that name is removed, so nothing is written into its target.
    """
    if slot.is_symlink():
        slot.unlink()
    run, old = _run_of(slot), slot.with_name(f".old-{slot.name}")
    if old.exists():
        _retire(run, old, slot)
    if slot.exists():
        aside = gives_up or _is_needed(run, slot, best)
        old = _move(run, slot, _free_place(run, slot.name)) if aside else slot.rename(old)
    try:
        temporary.rename(slot)
    except OSError:
        if old.exists():
            _move(run, old, slot)
        raise
    sync(slot.parent)
    if old.exists() and old.parent == slot.parent:
        _retire(run, old, slot)


def _run_of(slot: Path) -> Path:
    return slot.parent.parent if slot.parent.name == CHECKPOINTS else slot.parent


def _is_needed(run: Path, slot: Path, best: BestRecord | None) -> bool:
    if manifest_of(slot) is None:
        return True
    return find_best(run) == slot and not (best is not None and best.reaches(best_record(run)))


def _retire(run: Path, old: Path, successor: Path) -> Path | None:
    """Delete a replaced slot, or move it aside and return where, if its manifest or the successor's is unreadable."""
    if manifest_of(old) and manifest_of(successor):
        remove_tree(old)
        return None
    return _move(run, old, _free_place(run, successor.name))


def _move(run: Path, slot: Path, place: Path) -> Path:
    """Move a slot; `best` follows. best.json is first: until the rename, the link still points to the slot."""
    record = best_record(run) if find_best(run) == slot else None
    place.parent.mkdir(parents=True, exist_ok=True)
    if record is not None:
        _write_best(run, place, record)
    slot.rename(place)
    if record is not None:
        _link_best(run, place)
    return place


def _free_place(run: Path, name: str) -> Path:
    """Return a path in `discarded/` that does not exist."""
    path = run / CHECKPOINTS / DISCARDED / name.removeprefix(".old-")
    names = chain([path.name], (f"{path.name}-{number}" for number in count(2)))
    return next(place for place in map(path.with_name, names) if not place.exists())


def clean_up(run: Path) -> list[str]:
    """Remove the leftovers of killed saves and finish interrupted replacements. Returns a warning for each.

    Only the process that trains may call this: for any other, the leftovers may be a save in progress.
    """
    folders = [folder for folder in (run, run / CHECKPOINTS) if folder.is_dir()]
    paths = [path for folder in folders for path in sorted(folder.iterdir())]
    return [_clean_up(run, path) for path in paths if LEFTOVER.fullmatch(path.name)]


def _clean_up(run: Path, path: Path) -> str:
    target = path.with_name(path.name.removeprefix(".old-"))
    if path.name.startswith(".old-") and not target.exists():
        path.rename(target)
        return f"put {target.name} back: it was being replaced when the run ended"
    if path.name.startswith(".old-"):
        kept = _retire(run, path, target)
        if kept:
            return f"moved {path.name}, left by a run that ended while saving, to {kept}"
    elif path.is_dir():
        remove_tree(path)
    else:
        path.unlink()
    return f"removed {path.name}, left by a run that ended while saving"


def continue_from(run: Path, step: int) -> list[str]:
    """Move the slots later than `step` aside, and repair `best`. Returns warnings for the user."""
    moved = set_aside(run, step)
    warnings = [f"resuming from step {step}: moved a later checkpoint to {place}" for place in moved]
    warnings += repair_best(run)
    best = best_record(run)
    if best is not None and best.step > step:
        warnings.append(f"resuming from step {step}: the best checkpoint so far is that of step {best.step}")
    return warnings


def set_aside(run: Path, after: int) -> list[Path]:
    """Move the slots later than step `after` to `checkpoints/discarded/`. Returns their new places.

    In their old places, the next `--resume latest` would take one of them for the newest checkpoint.
    """
    later = [slot for slot in find_slots(run) if step_of(slot) > after]
    return [_move(run, slot, _free_place(run, slot.name)) for slot in later]


def rotate(run: Path, step: int, keep_last: int, keep_every: int = 0) -> list[Path]:
    """Delete the oldest slots up to `step`, so that `keep_last` remain. Returns the deleted slots.

    The best slot and the multiples of `keep_every` are neither deleted nor counted. A multiple counts by the present
    value of `keep_every`, or by its value when the slot was written.
    """
    if keep_last == 0:
        return []
    best = find_best(run)
    counted = [slot for slot in find_slots(run) if slot != best and not _is_kept(slot, keep_every)]
    surplus = [slot for slot in counted if step_of(slot) <= step][keep_last:]
    for slot in surplus:
        remove_tree(slot)
    return surplus


def is_multiple(step: int, every: int) -> bool:
    """Whether a step is a multiple of `every`. Step 0 never is, and no step is a multiple of 0."""
    return every > 0 and step > 0 and step % every == 0


def _is_kept(slot: Path, keep_every: int) -> bool:
    manifest = manifest_of(slot)
    return is_multiple(step_of(slot), keep_every) or bool(manifest and manifest.meta.get("keep"))
