"""Choosing a slot, the newest that every machine finds whole or the one the user named, and restoring it."""

from os.path import expanduser
from pathlib import Path
from typing import NamedTuple

from rawloop.checkpoint import slots
from rawloop.checkpoint.capture import Parts
from rawloop.checkpoint.disk import read_packed
from rawloop.checkpoint.manifest import NAME, Manifest, read_manifest, verify
from rawloop.checkpoint.pack import unpack
from rawloop.checkpoint.writer import STATE, rank_file
from rawloop.dist import World
from rawloop.errors import CheckpointError, UserError
from rawloop.hashing import sha256_file
from rawloop.records import Records


class Chosen(NamedTuple):
    """The slot to restore, of which every machine has verified every file, and newer ones that are damaged: why."""

    slot: Path
    passed_over: dict[Path, str]


def choose(run: Path, which: str | Path, world: World) -> Chosen:
    """Verify the slot that is asked for; of `latest`, take the newest that every machine finds whole. Reads only.

    The first rank of each machine reads all files, the others take its word.

    Raises:
        UserError: there is no checkpoint, or no such folder, or another one on some rank.
        CheckpointError: the named one is damaged, or none of the run is whole. On all ranks alike.
    """
    if which != "latest":
        named = slots.resolve_best(Path(expanduser(which)))
        world.on_all_ranks(lambda: check_slot(named, all_files=world.local_rank == 0))
        check_same(named, world)
        return Chosen(named, {})
    seen = world.on_all_ranks(lambda: (slots.find_slots(run), slots.readable_best(run)), only_main=True)
    candidates, best = world.from_main(seen or ([], None))
    if not candidates:
        advice = f"the best one is at hand, try --resume {best}" if best else "start without --resume, or say 'auto'"
        raise world.raised_on_all(UserError(f"resume is 'latest', but '{run}' has no checkpoint: {advice}"))
    passed_over: dict[Path, str] = {}
    for slot in candidates:
        reason = _why_not(slot, world)
        if reason is None:
            check_same(slot, world)
            return Chosen(slot, passed_over)
        passed_over[slot] = reason
    advice = f"; the best one is not among these, try --resume {best}" if best and best not in candidates else ""
    reasons = "; ".join(passed_over.values())
    raise world.raised_on_all(CheckpointError(f"no checkpoint of '{run}' is whole{advice}: {reasons}"))


def check_same(slot: Path | None, world: World) -> None:
    """Refuse ranks that have chosen different checkpoints, or machines that have their own under one path.

    Args:
        slot: the checkpoint that this rank reads; None if it reads none.
        world: the ranks.

    Raises:
        UserError: on all ranks alike.
    """
    own = world.on_all_ranks(
        lambda: None if slot is None else (read_manifest(slot).step, sha256_file(slot / NAME)[:16])
    )
    world.check_equal(
        {"the checkpoint": f"step {own[0]}, digest {own[1]}" if own else "none"},
        "name one checkpoint's folder for all processes, on a disk that all machines share",
    )


def _why_not(slot: Path, world: World) -> str | None:
    """Return the first rank's reason against a slot, or None if all machines find it whole."""
    mine = None
    try:
        with world.working():
            verify(slot) if world.local_rank == 0 else read_manifest(slot)
    except CheckpointError as error:
        mine = str(error)
    found = [(rank, reason) for rank, reason in enumerate(world.gather(mine)) if reason is not None]
    if not found:
        return None
    rank, reason = found[0]
    return reason if rank == 0 else f"rank {rank}: {reason}"


def check_slot(slot: Path, *, all_files: bool = True) -> None:
    """Refuse a path that the user gave and that is no whole checkpoint.

    Raises:
        UserError: it is none.
        CheckpointError: it is damaged.
    """
    advice = "name a checkpoint's folder, such as RUN/checkpoints/step-00000500 or RUN/best, or say 'latest' or 'auto'"
    if not slot.is_dir():
        raise UserError(f"resume is '{slot}', which is no folder: {advice}")
    for run, what in ((slot, "a run"), (slot.parent, "the folder of a run's checkpoints")):
        if (run / slots.CHECKPOINTS).is_dir() and slot in (run, run / slots.CHECKPOINTS):
            names = ", ".join(path.name for path in slots.find_slots(run)) or "none"
            raise UserError(f"resume is '{slot}', which is {what}: name one of them ({names}), or say 'latest'")
    if not (slot / NAME).exists() and not slots.is_slot_name(slot):
        what = "a part of a checkpoint" if (slot.parent / NAME).exists() else "no checkpoint"
        raise UserError(f"resume is '{slot}', which is {what}: {advice}")
    verify(slot) if all_files else read_manifest(slot)


def check_parts(slot: Path, manifest: Manifest, expected: set[str]) -> None:
    """Check that a checkpoint holds exactly the parts that this run has."""
    held = {*manifest.states, *manifest.per_rank, *manifest.folders}
    wrong = []
    if expected - held:
        wrong.append(f"it lacks {', '.join(sorted(expected - held))}")
    if held - expected:
        wrong.append(f"it holds {', '.join(sorted(held - expected))}, which this run has no use for")
    if wrong:
        raise CheckpointError(f"{slot} cannot be restored: {'; '.join(wrong)}")


def restore_parts(slot: Path, parts: Parts, world: World, records: Records) -> Manifest:
    """Restore every part on every rank, and return the slot's manifest.

    One rank of a machine after another: each has the whole optimizer in host memory for a moment.

    Raises:
        CheckpointError: the slot does not hold exactly the parts of this run.
    """

    def check() -> Manifest:
        manifest = read_manifest(slot)
        check_parts(slot, manifest, {*parts.states, *parts.folders})
        return manifest

    manifest = world.on_all_ranks(check)
    assert manifest is not None
    for turn in range(1 + max(world.gather(world.local_rank))):
        world.on_all_ranks(lambda turn=turn: _restore(slot, manifest, parts, turn, world, records))  # type: ignore[misc]
    return manifest


def _restore(slot: Path, manifest: Manifest, parts: Parts, turn: int, world: World, records: Records) -> None:
    """Restore weights first and random streams last, because building the former may draw from the latter."""
    if world.local_rank != turn:
        return
    for name, folder_part in parts.folders.items():
        folder_part.load(slot / manifest.folders[name])
    for name, part in parts.states.items():
        if name not in parts.per_rank:
            part.load_state_dict(unpack(read_packed(slot / STATE, name)))
    known = world.rank < manifest.world_size
    for name, rank_part in parts.per_rank.items():
        if known:
            rank_part.load_state_dict(unpack(read_packed(slot / STATE, rank_file(name, world.rank))))
        else:
            rank_part.start_afresh(manifest.step)
    if not known and parts.per_rank:
        names = ", ".join(parts.per_rank)
        reason = f"what this rank has of its own ({names}) starts afresh: {manifest.world_size} rank(s) wrote it"
        records.event("restore", step=manifest.step, reason=reason)


def changes(then: dict[str, str | None], now: dict[str, str | None]) -> str:
    """Return a clause naming the packages whose version differs from when the checkpoint was written."""
    changed = [f"{name} {then.get(name)} then, {here} now" for name, here in now.items() if then.get(name) != here]
    return f" ({'; '.join(changed)})" if changed else ""
