"""Choosing a slot to restore: the newest that every rank finds whole, or the one the user named. Read-only."""

from pathlib import Path

from rawloop.checkpoint import slots
from rawloop.checkpoint.manifest import Manifest, verify
from rawloop.dist import World
from rawloop.errors import CheckpointError, UserError
from rawloop.records import Records


def agree_on_latest(run: Path, world: World, records: Records) -> Path:
    """Return the newest slot that every rank finds whole. Each one passed over is an event.

    Raises:
        UserError: the run has no checkpoint.
        CheckpointError: none of its checkpoints is whole.
    """
    candidates = world.from_main(slots.find_slots(run))
    if not candidates:
        raise UserError(f"resume is 'latest', but '{run}' has no checkpoint: start without --resume")
    reasons = []
    for slot in candidates:
        reason = _why_not(slot, world)
        if reason is None:
            return slot
        reasons.append(reason)
        if world.is_main:
            records.event("warning", step=slots.step_of(slot), reason=f"passed over a checkpoint: {reason}")
    best = slots.find_best(run)
    advice = f"; the best one is a slot of its own, try --resume {best}" if best else ""
    raise CheckpointError(f"no checkpoint of '{run}' is whole{advice}: " + "; ".join(reasons))


def _why_not(slot: Path, world: World) -> str | None:
    """Return the first rank's reason against a slot, or None if all ranks find it whole."""
    try:
        verify(slot)
        mine = None
    except CheckpointError as error:
        mine = str(error)
    found = [(rank, reason) for rank, reason in enumerate(world.gather(mine)) if reason is not None]
    if not found:
        return None
    rank, reason = found[0]
    return reason if rank == 0 else f"rank {rank}: {reason}"


def check_slot(slot: Path) -> None:
    """Refuse a path that the user gave and that is no whole checkpoint."""
    if (slot / slots.CHECKPOINTS).is_dir():
        names = ", ".join(path.name for path in slots.find_slots(slot)) or "none"
        raise UserError(f"resume is '{slot}', which is a run: name one of its checkpoints ({names}), or say 'latest'")
    if not slot.is_dir():
        raise UserError(f"resume is '{slot}', which is no folder: name a checkpoint's folder, or say 'latest'")
    verify(slot)


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


def changes(then: dict[str, str | None], now: dict[str, str | None]) -> str:
    """Return a clause naming the packages whose version differs from when the checkpoint was written."""
    changed = [f"{name} {then.get(name)} then, {here} now" for name, here in now.items() if then.get(name) != here]
    return f" ({'; '.join(changed)})" if changed else ""
