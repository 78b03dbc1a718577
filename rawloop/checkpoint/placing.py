"""Changes to the slots of a run: a finished one takes its name, old ones go, `best` moves, dead saves are tidied up.

Only the process that trains into a folder calls these. A kill at any point leaves whole slots alone under their names,
and a `best` that is the old one or the new one.
"""

import errno
import json
import re
from pathlib import Path

from rawloop.checkpoint.best import BestRecord
from rawloop.checkpoint.disk import remove_tree
from rawloop.checkpoint.manifest import step_of, verify
from rawloop.checkpoint.slots import (
    BEST,
    BEST_FILE,
    CHECKPOINTS,
    DISCARDED,
    best_record,
    find_best,
    find_slots,
    is_old_best,
    json_of_best,
    link_of_best,
    manifest_of,
    points_nowhere,
    slot_name,
)
from rawloop.errors import CheckpointError
from rawloop.files import replace_file, sync

LEFTOVER = re.compile(r"\.(tmp|trash|old)-(step-\d+|best|best\.json|metrics\.jsonl)")
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


def set_best(run: Path, slot: Path, record: BestRecord) -> list[str]:
    """Let `best` point to a slot. Returns what the user should know.

    The slot that it pointed to becomes an ordinary one. If its value is better, as after a change of the metric, it is
    moved to the discarded, where rotation does not delete it.
    """
    adopt_best(run, record.step)
    before, was = find_best(run), best_record(run)
    if before not in (None, slot) and before.parent == run / CHECKPOINTS and not record.reaches(was):
        _move(before, _place_aside(before))
    _write_best(run, slot, record)
    return _link_best(run, slot)


def mend_best(run: Path) -> list[str]:
    """Make best.json and the link agree, after a kill. Returns what the user should know."""
    slot = find_best(run)
    if slot is None:
        return [f"{run / BEST} points to a checkpoint that is not there"] if points_nowhere(run) else []
    manifest, record = manifest_of(slot), best_record(run)
    if record is None:
        return [f"{slot}: neither its manifest nor best.json says of which evaluation it is the best"]
    _write_best(run, slot, record)
    said = _link_best(run, slot)
    if manifest is None:
        said.append(f"the best checkpoint, {slot}, is damaged: its manifest cannot be read")
    return said


def _write_best(run: Path, slot: Path, record: BestRecord) -> None:
    text = json.dumps({**record._asdict(), "slot": slot.relative_to(run).as_posix()}, indent=1) + "\n"
    path = run / BEST_FILE
    if not path.is_file() or path.read_bytes() != text.encode():
        replace_file(path, text)


def _link_best(run: Path, slot: Path) -> list[str]:
    """Replace the link. Where the file system has none, best.json alone is the pointer."""
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


def adopt_best(run: Path, step: int) -> list[str]:
    """Turn the `best` folder of an older version of rawloop into a slot that `best` points to.

    It becomes the slot of its step if that name is free and the run goes on from no earlier one.
    """
    if not is_old_best(run):
        return []
    manifest, record = manifest_of(run / BEST), best_record(run)
    slot = run / str(json_of_best(run).get("slot"))
    if record is not None and manifest == manifest_of(slot) and slot.parent != run and _is_whole(slot):
        remove_tree(run / BEST)  # the run was copied by a program that follows links
        return [f"removed {run / BEST}, a copy of {slot}", *_link_best(run, slot)]
    place = run / CHECKPOINTS / slot_name(manifest.step if manifest else 0)
    if manifest is None or manifest.step > step or place.exists():
        place = _place_aside(place if manifest else run / CHECKPOINTS / BEST)
    place.parent.mkdir(parents=True, exist_ok=True)
    if record is not None:
        _write_best(run, place, record)
    (run / BEST).rename(place)
    said = _link_best(run, place) if record is not None else []
    return [f"moved {run / BEST}, a folder of an older version of rawloop, to {place}", *said]


def _is_whole(slot: Path) -> bool:
    try:
        verify(slot)
    except CheckpointError:
        return False
    return True


def put_in_place(temporary: Path, slot: Path, *, gives_up: bool = False, best: BestRecord | None = None) -> None:
    """Give a finished folder its final name. A slot of that name is deleted only after that, or moved aside.

    It is moved aside if it is of another continuation (`gives_up`), if its manifest cannot be read, or if `best` points
    to it and the new one is no better. Killed at any point, the one or the other is there, whole. A link in its place
    is removed: nothing is written where it leads.
    """
    if slot.is_symlink():
        slot.unlink()
    old = slot.with_name(f".old-{slot.name}")
    if old.exists():
        _retire(old, slot)
    if slot.exists():
        old = _move(slot, _place_aside(slot)) if gives_up or _is_needed(slot, best) else slot.rename(old)
    try:
        temporary.rename(slot)
    except OSError:
        if old.exists():
            _move(old, slot)
        raise
    sync(slot.parent)
    if old.exists() and old.parent == slot.parent:
        _retire(old, slot)


def _is_needed(slot: Path, best: BestRecord | None) -> bool:
    run = _run_of(slot)
    if manifest_of(slot) is None:
        return True
    return find_best(run) == slot and not (best is not None and best.reaches(best_record(run)))


def _retire(old: Path, successor: Path) -> Path | None:
    """Delete a slot that has been replaced, or move it aside if either manifest cannot be read. Returns where it is."""
    if manifest_of(old) and manifest_of(successor):
        remove_tree(old)
        return None
    return _move(old, _place_aside(successor))


def _move(slot: Path, place: Path) -> Path:
    """Move a slot; `best` follows. best.json comes first: until the rename, the link still leads to the slot."""
    run = _run_of(slot)
    record = best_record(run) if find_best(run) == slot else None
    place.parent.mkdir(parents=True, exist_ok=True)
    if record is not None:
        _write_best(run, place, record)
    slot.rename(place)
    if record is not None:
        _link_best(run, place)
    return place


def _place_aside(slot: Path) -> Path:
    """Return a free path among the discarded for a slot."""
    return _free_name(_run_of(slot) / CHECKPOINTS / DISCARDED / slot.name.removeprefix(".old-"))


def _run_of(slot: Path) -> Path:
    parent = slot.parent.parent if slot.parent.name == DISCARDED else slot.parent
    return parent.parent if parent.name == CHECKPOINTS else parent


def clean_up(run: Path) -> list[str]:
    """Remove what dead saves have left and finish interrupted replacements. Returns a sentence for each.

    Only for the process that trains: in any other, the leftovers might be a save in progress.
    """
    done = []
    for folder in (run, run / CHECKPOINTS):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if LEFTOVER.fullmatch(path.name):
                done.append(_clean_up(path))
    return done


def _clean_up(path: Path) -> str:
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
    return [_move(slot, _place_aside(slot)) for slot in find_slots(run) if step_of(slot) > after]


def _free_name(path: Path) -> Path:
    number = 1
    free = path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def rotate(run: Path, step: int, keep_last: int, keep_every: int = 0) -> list[Path]:
    """Delete the oldest slots so that `keep_last` remain, the one of `step` among them. Returns the deleted ones.

    The slot that `best` points to is neither deleted nor counted, nor are multiples of `keep_every`, by its value of
    today or of when they were written.
    """
    if keep_last == 0:
        return []
    best = find_best(run)
    counted = [
        slot
        for slot in find_slots(run)
        if slot != best and not is_kept(step_of(slot), keep_every) and not _marked(slot)
    ]
    surplus = [slot for slot in counted if step_of(slot) <= step][keep_last:]
    for slot in surplus:
        remove_tree(slot)
    return surplus


def is_kept(step: int, keep_every: int) -> bool:
    """Whether the checkpoint of a step is one of those that are kept for ever; 0 sets none apart."""
    return keep_every > 0 and step > 0 and step % keep_every == 0


def _marked(slot: Path) -> bool:
    manifest = manifest_of(slot)
    return manifest is not None and bool(manifest.meta.get("keep"))
