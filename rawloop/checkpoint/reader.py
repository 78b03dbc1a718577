"""Chooses the checkpoint to restore, the same on all ranks, and restores it."""

from functools import partial
from os.path import expanduser
from pathlib import Path
from typing import Any, NamedTuple

from rawloop.checkpoint.parts import Parts
from rawloop.checkpoint.slots import (
    CHECKPOINTS,
    MANIFEST,
    STATE,
    Manifest,
    find_slots,
    is_slot_name,
    rank_file,
    read_manifest,
    readable_best,
    resolve_best,
    verify,
)
from rawloop.dist import World
from rawloop.errors import CheckpointError, UserError
from rawloop.files import sha256_file
from rawloop.pack import read_state
from rawloop.records import Records


class Restored(NamedTuple):
    """The slot that was restored, its step, and the number of ranks that wrote it."""

    slot: Path
    step: int
    world_size: int


def choose(run: Path, which: str | Path, world: World) -> tuple[Path, dict[Path, str]]:
    """Choose and verify the checkpoint to restore: a named slot, or `latest`, the newest that all machines find whole.

    The first rank of each machine reads all files. Nothing is written.

    Returns:
        the slot, and the damaged newer ones, each with the reason.

    Raises:
        UserError: there is no checkpoint, no such folder, or another checkpoint on some rank.
        CheckpointError: the named one is damaged, or none of the run is whole. On all ranks.
    """
    if which != "latest":
        named = resolve_best(Path(expanduser(which)))
        world.on_all_ranks(lambda: check_slot(named, all_files=world.local_rank == 0))
        check_same(named, world)
        return named, {}
    seen = world.on_all_ranks(lambda: (find_slots(run), readable_best(run)), only_main=True)
    candidates, best = world.from_main(seen or ([], None))
    if not candidates:
        advice = f"pass --resume {best} for the best one" if best else "start without --resume, or say 'auto'"
        raise world.raised_on_all(UserError(f"resume is 'latest', but '{run}' has no checkpoint: {advice}"))
    damaged: dict[Path, str] = {}
    for slot in candidates:
        reason = _why_damaged(slot, world)
        if reason is None:
            check_same(slot, world)
            return slot, damaged
        damaged[slot] = reason
    advice = f"; the best one was not tried: pass --resume {best}" if best and best not in candidates else ""
    reasons = "; ".join(damaged.values())
    raise world.raised_on_all(CheckpointError(f"no checkpoint of '{run}' is whole{advice}: {reasons}"))


def check_same(slot: Path | None, world: World) -> None:
    """Raise UserError on all ranks if their checkpoints differ, or machines have different files under one path.

    Args:
        slot: the checkpoint that this rank reads, or None.
        world: the ranks.
    """
    mine = world.on_all_ranks(
        lambda: None if slot is None else f"step {read_manifest(slot).step}, digest {sha256_file(slot / MANIFEST)[:16]}"
    )
    advice = "name one checkpoint's folder for all processes, on a disk that all machines share"
    world.check_equal({"the checkpoint": mine or "none"}, advice)


def _why_damaged(slot: Path, world: World) -> str | None:
    """Return the first damage that a rank finds in a slot, or None if it is whole on all machines."""
    mine = None
    try:
        with world.working():
            verify(slot) if world.local_rank == 0 else read_manifest(slot)
    except CheckpointError as error:
        mine = str(error)
    found = ((rank, reason) for rank, reason in enumerate(world.gather(mine)) if reason is not None)
    rank, reason = next(found, (0, None))
    return f"rank {rank}: {reason}" if rank else reason


def check_slot(slot: Path, *, all_files: bool = True) -> None:
    """Check that a path from the user is a whole checkpoint.

    Raises:
        UserError: it is no checkpoint.
        CheckpointError: it is damaged.
    """
    advice = "name a checkpoint's folder, such as RUN/checkpoints/step-00000500 or RUN/best, or say 'latest' or 'auto'"
    if not slot.is_dir():
        raise UserError(f"resume is '{slot}', which is no folder: {advice}")
    for run, what in ((slot, "a run"), (slot.parent, "the folder of a run's checkpoints")):
        if (run / CHECKPOINTS).is_dir() and slot in (run, run / CHECKPOINTS):
            names = ", ".join(path.name for path in find_slots(run)) or "none"
            raise UserError(f"resume is '{slot}', which is {what}: name one of them ({names}), or say 'latest'")
    if not (slot / MANIFEST).exists() and not is_slot_name(slot):
        what = "a part of a checkpoint" if (slot.parent / MANIFEST).exists() else "no checkpoint"
        raise UserError(f"resume is '{slot}', which is {what}: {advice}")
    verify(slot) if all_files else read_manifest(slot)


def stored_part(slot: Path, name: str, *, tensors: bool = True) -> Any:
    """Read the state of one part of a checkpoint; None if the checkpoint has no such part.

    Without `tensors`, only the small JSON file is read, and every tensor is None.
    """
    folder = slot / STATE
    return read_state(folder, name, tensors) if (folder / f"{name}.json").is_file() else None


def restore_parts(slot: Path, parts: Parts, world: World, records: Records) -> Manifest:
    """Restore every part on every rank, and return the slot's manifest.

    The ranks of a machine restore one after another, because each needs the whole optimizer in host memory.

    Raises:
        CheckpointError: the parts of the slot are not the parts of this run.
    """

    def check() -> Manifest:
        manifest = read_manifest(slot)
        stored = {*manifest.states, *manifest.per_rank, *manifest.folders}
        expected = {*parts.states, *parts.folders}
        wrong = [f"it lacks {', '.join(sorted(expected - stored))}"] if expected - stored else []
        if stored - expected:
            wrong.append(f"it holds {', '.join(sorted(stored - expected))}, which this run does not have")
        if wrong:
            raise CheckpointError(f"{slot} cannot be restored: {'; '.join(wrong)}")
        return manifest

    manifest = world.on_all_ranks(check)
    assert manifest is not None
    for turn in range(1 + max(world.gather(world.local_rank))):
        world.on_all_ranks(partial(_restore, slot, manifest, parts, turn, world, records))
    return manifest


def _restore(slot: Path, manifest: Manifest, parts: Parts, turn: int, world: World, records: Records) -> None:
    """Restore weights first and random streams last, because building the weights may draw random numbers."""
    if world.local_rank != turn:
        return
    for name, folder_part in parts.folders.items():
        folder_part.load(slot / manifest.folders[name])
    for name, part in parts.states.items():
        if name not in parts.per_rank:
            part.load_state_dict(read_state(slot / STATE, name))
    is_stored = world.rank < manifest.world_size
    for name, rank_part in parts.per_rank.items():
        if is_stored:
            rank_part.load_state_dict(read_state(slot / STATE, rank_file(name, world.rank)))
        else:
            rank_part.start_afresh(manifest.step)
    if not is_stored and parts.per_rank:
        names = ", ".join(parts.per_rank)
        reason = f"this rank has no stored state of {names} and starts afresh: {manifest.world_size} rank(s) wrote it"
        records.event("restore", step=manifest.step, reason=reason)
