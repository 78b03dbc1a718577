"""`rawloop verify RUN`: compares every file of a run's checkpoints with its digest.

It only reads, so it may run while the run is training. Then slots are deleted and replaced meanwhile: damage counts
only if the slot is still the same folder afterwards.
"""

import time
from collections.abc import Iterator
from os.path import expanduser
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
    find_best,
    find_slots,
    is_slot_name,
    manifest_of,
    points_nowhere,
    step_of,
    verify,
)
from rawloop.cli import read_options
from rawloop.errors import CheckpointError, UserError
from rawloop.files import readable

UNFINISHED = "being written, or left by a save that was killed; never taken for a checkpoint"


class Found(NamedTuple):
    """The result for one slot. `manifest` is None if it cannot be read."""

    verdict: Literal["whole", "DAMAGED", "unreadable", "unfinished", "gone"]
    reason: str = ""
    manifest: Manifest | None = None


def run(argv: list[str]) -> None:
    """Print a line per checkpoint. A damaged checkpoint is an error, and so is a run without a whole one."""
    folder = Path(expanduser(read_options("verify", argv).run))
    slots = slots_to_examine(folder)
    names = [str(slot.relative_to(folder)) if slot != folder else slot.name for slot in slots]
    width = max(map(len, [*names, "checkpoint"]))
    print(f"{'checkpoint':<{width}} {'step':>9} {'files':>6} {'size':>10} {'seconds':>8}  verdict", flush=True)
    counts: dict[str, list[str]] = {}
    best = find_best(folder)
    for name, slot in zip(names, slots, strict=True):
        start = time.perf_counter()
        found = examine(slot)
        counts.setdefault(found.verdict, []).append(name)
        line = columns(slot, found, time.perf_counter() - start, slot == best)
        print(f"{name:<{width}} {line}", flush=True)
    wrong = [f"{len(counts[v])} {v.lower()} ({', '.join(counts[v])})" for v in ("DAMAGED", "unreadable") if v in counts]
    if points_nowhere(folder):
        wrong.append("best points to a checkpoint that does not exist")
    whole = len(counts.get("whole", []))
    if wrong:
        raise CheckpointError(f"{', '.join(wrong)}, {whole} whole")
    if not whole:
        raise CheckpointError("there is no whole checkpoint yet: nothing was verified")
    print(f"{whole} whole, none damaged", flush=True)


def columns(slot: Path, found: Found, seconds: float, is_best: bool) -> str:
    """Return the columns of the table after the slot's name."""
    manifest = found.manifest
    step = manifest.step if manifest else step_of(slot)
    files, size = (str(len(manifest.files)), readable(manifest.size)) if manifest else ("-", "-")
    verdict = f"{found.verdict}{', the best' if is_best else ''}{f': {found.reason}' if found.reason else ''}"
    return f"{step if step >= 0 else '-':>9} {files:>6} {size:>10} {seconds:>8.2f}  {verdict}"


def slots_to_examine(folder: Path) -> list[Path]:
    """Return all slots of a run: newest first, then discarded and unfinished ones. Of a slot, return the slot.

    Raises:
        UserError: the folder is neither a run nor a slot.
    """
    try:
        if not folder.is_dir():
            raise UserError(f"'{folder}' is no folder: name a run's folder, or one of its checkpoints")
        is_run = any((folder / mark).exists() for mark in MARKS)
        if (folder / MANIFEST).exists() or (is_slot_name(folder) and not is_run):
            return [folder]
        if (folder.parent / MANIFEST).exists():
            raise UserError(f"'{folder}' is a part of a checkpoint: name that, '{folder.parent}'")
        if not is_run:
            advice = f": name the run, '{folder.parent}'" if folder.name == CHECKPOINTS else ", nor a checkpoint"
            raise UserError(f"'{folder}' is no run{advice}")
        return list(_slots_of_run(folder))
    except OSError as error:
        raise UserError(f"'{folder}' cannot be read: {error.strerror}") from error


def _slots_of_run(run: Path) -> Iterator[Path]:
    yield from find_slots(run)
    if best_is_folder(run):
        yield run / BEST
    checkpoints = run / CHECKPOINTS
    for folder, pattern in ((checkpoints / DISCARDED, "*"), (checkpoints, ".tmp-*"), (run, ".tmp-*")):
        yield from sorted(path for path in folder.glob(pattern) if path.is_dir())


def examine(slot: Path) -> Found:
    """Check every file of a slot by size and digest."""
    if slot.name.startswith(".tmp-"):
        return Found("unfinished", UNFINISHED)
    try:
        return _examine(slot)
    except OSError as error:
        return Found("unreadable", f"it cannot be read: {error.strerror}")


def _examine(slot: Path) -> Found:
    while (before := _identity(slot)) is not None:
        try:
            return Found("whole", manifest=verify(slot))
        except CheckpointError as error:
            if _identity(slot) == before:
                verdict: Any = "unreadable" if isinstance(error.__cause__, OSError) else "DAMAGED"
                return Found(verdict, str(error).removeprefix(f"{slot}: "), manifest_of(slot))
    return Found("gone", "deleted or replaced meanwhile")


def _identity(slot: Path) -> tuple[int, int, int] | None:
    """Return numbers that change when another folder takes the name; None if there is no folder."""
    try:
        found = slot.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns
