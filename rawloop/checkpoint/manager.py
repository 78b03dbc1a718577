"""Saves and restores a run. It knows nothing of models or optimizers: only a dict of named parts that have state.

A save is written into a temporary folder, forced to the disk, sealed by a manifest with digests, and renamed. Whatever
happens in between, what was saved before stays, and nothing half-written is ever taken for a checkpoint.
"""

import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

from safetensors import SafetensorError

from rawloop.checkpoint import slots
from rawloop.checkpoint.disk import check_space, in_words, read_packed, readable, sync
from rawloop.checkpoint.manifest import Manifest, installed_versions, read_manifest
from rawloop.checkpoint.pack import Packed, pack, unpack
from rawloop.checkpoint.reader import agree_on_latest, changes, check_parts, check_slot
from rawloop.checkpoint.writer import STATE, Contents, discard, rank_file, temporary_of, write_slot
from rawloop.contracts import FolderState, Stateful
from rawloop.dist import World
from rawloop.errors import CheckpointError, RawloopError, UserError
from rawloop.records import EventKind, Records


@dataclass
class CheckpointConfig:
    """When checkpoints are written and how many are kept.

    Args:
        save_every: optimizer steps between two checkpoints; 0 writes none but the one at the end.
        keep_last: newest checkpoints to keep; 0 keeps all. The best one has a slot of its own and is not counted.
        save_at_end: write a checkpoint after the last step, whatever `save_every` says.
    """

    save_every: int = 500
    keep_last: int = 3
    save_at_end: bool = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("save_every", "keep_last"):
            if getattr(self, name) < 0:
                raise UserError(f"checkpoint.{name} is {getattr(self, name)}: it must be 0 or more")


class PerRank(Stateful, Protocol):
    """A part whose state differs from rank to rank (random streams): it has `per_rank = True`."""

    per_rank: bool

    def start_afresh(self, step: int) -> None:
        """Derive a state for a rank that the checkpoint has none of, because the world was smaller."""
        ...


class Restored(NamedTuple):
    """What was loaded: the slot, its step, the caller's own `meta`, and the number of ranks that wrote it."""

    slot: Path
    step: int
    meta: dict[str, Any]
    world_size: int


def _check_names(state: Mapping[str, Stateful | FolderState], homes: list[str]) -> None:
    for name in [*state, *homes]:
        assert re.fullmatch(r"\w[\w.-]*", name), f"{name!r} cannot be the name of a file"
    assert len({*homes, STATE}) == len(homes) + 1, f"folders of parts must differ: {homes}"
    for name, part in state.items():
        kinds = isinstance(part, Stateful) + isinstance(part, FolderState)
        assert kinds == 1, f"{name!r} must be Stateful or a FolderState, and not both: {type(part)}"


class CheckpointManager:
    """Writes the parts in `state` to slots in a run folder and reads them back.

    `state_dict` of every part is called on every rank; what rank 0 returns is written, except for parts with
    `per_rank`, of which every rank's is. A `FolderState` writes its files on rank 0.

    `start`, `save`, `save_best` and `load` must be called on every rank.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        world: World,
        records: Records,
        state: Mapping[str, Stateful | FolderState],
    ) -> None:
        self.folder = folder
        self.config = config
        self.world = world
        self.records = records
        self.folders = {name: part for name, part in state.items() if isinstance(part, FolderState)}
        self.states = {name: part for name, part in state.items() if isinstance(part, Stateful)}
        self.per_rank = {
            name: cast(PerRank, part) for name, part in self.states.items() if getattr(part, "per_rank", False)
        }
        self._settled_step = -1  # saved or restored last: saving it again would write the same thing
        self._versions = installed_versions()
        self._last_size = 0  # bytes; not known before the first save
        _check_names(state, [part.folder for part in self.folders.values()])

    def start(self, step: int) -> None:
        """Make the run folder ready for training on from `step` (0 in a new run); after `load`, if there is one.

        Removes what dead saves have left and moves checkpoints later than `step` aside.
        """
        self.world.together(lambda: self._start(step), only_main=True)

    def _start(self, step: int) -> None:
        (self.folder / slots.CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        sync(self.folder)
        for sentence in slots.clean_up(self.folder):
            self.records.event("warning", step=step, reason=sentence)
        for moved in slots.set_aside(self.folder, step):
            self.records.event("warning", step=step, reason=f"going on from step {step}: moved a later one to {moved}")
        try:
            best = slots.note_best(self.folder)
        except CheckpointError as error:
            self.records.event("warning", step=step, reason=f"the best checkpoint is damaged: {error}")
            return
        if best is not None and best.step > step:
            reason = f"going on from step {step}: the best checkpoint so far is of step {best.step}"
            self.records.event("warning", step=step, reason=reason)

    def newest(self) -> Path | None:
        """Return the newest checkpoint of the run, if there is one."""
        return next(iter(slots.find_slots(self.folder)), None)

    def due(self, step: int, last: bool) -> bool:
        """Return whether to save at `step`; `last` says that the run ends here."""
        if step == self._settled_step:
            return False
        if last and self.config.save_at_end:
            return True
        return self.config.save_every > 0 and step > 0 and step % self.config.save_every == 0

    def save(self, step: int, *, meta: Mapping[str, Any] | None = None) -> Path:
        """Write the checkpoint of `step`, then delete the oldest ones. Returns its folder.

        `meta` (JSON values) is kept with it and returned by `load`.

        Raises:
            CheckpointError: it could not be written; what was saved before is untouched.
        """
        slot = self.folder / slots.CHECKPOINTS / slots.slot_name(step)
        self._store(slot, step, dict(meta or {}), finish=lambda: self._rotate(step))
        self._settled_step = step
        return slot

    def save_best(self, step: int, metric_name: str, value: float, *, meta: Mapping[str, Any] | None = None) -> Path:
        """Write the whole state into the best slot and note it in `best.json`. Returns the slot's folder.

        The previous best is replaced only when the next one is complete.

        Raises:
            CheckpointError: it could not be written; the previous best is untouched.
        """
        assert math.isfinite(value), f"{metric_name} is {value} at step {step}: that is never the best"
        best = {"metric": metric_name, "value": value, "step": step}
        slot = self.folder / slots.BEST
        self._store(slot, step, {**(meta or {}), "best": best}, finish=lambda: slots.note_best(self.folder))
        return slot

    def _store(self, slot: Path, step: int, meta: dict[str, Any], finish: Callable[[], object]) -> None:
        assert not pack(meta).tensors, f"meta takes JSON values, not tensors: {list(meta)}"
        states = self.world.together(self._collect)
        assert states is not None
        every_rank = self.world.gather((step, {name: states[name] for name in self.per_rank}))
        steps = [rank_step for rank_step, _ in every_rank]
        assert steps == [step] * self.world.size, f"ranks save different steps: {steps}"
        shared = {name: packed for name, packed in states.items() if name not in self.per_rank}
        contents = Contents(step, meta, self._versions, shared, [own for _, own in every_rank])
        # only rank 0 writes; once other ranks write files, they must agree before the manifest is written
        self.world.together(lambda: self._write(slot, contents, finish), only_main=True)

    def _collect(self) -> dict[str, Packed]:
        """Take the state of every part; packing it copies from the device, so other ranks pack only their own."""
        states = {name: part.state_dict() for name, part in self.states.items()}
        wanted = states if self.world.is_main else self.per_rank
        return {name: pack(states[name]) for name in wanted}

    def _write(self, slot: Path, contents: Contents, finish: Callable[[], object]) -> None:
        begun = time.perf_counter()
        try:
            check_space(self.folder, self._last_size)
            manifest = write_slot(slot, contents, self.folders)
            finish()
        except (OSError, SafetensorError, RawloopError) as error:
            raise self._failure(slot, contents.step, error) from error
        self._last_size = manifest.size
        self._report(slot, manifest, time.perf_counter() - begun)

    def _report(self, slot: Path, manifest: Manifest, seconds: float) -> None:
        kind: EventKind = "save"
        more: dict[str, Any] = {}
        text = f"wrote {slot.name} ({readable(manifest.size)} in {seconds:.2f} s)"
        if slot.name == slots.BEST:
            kind, more = "best", {name: value for name, value in manifest.meta["best"].items() if name != "step"}
            text = f"{more['metric']} is {more['value']:.6g}, the best so far: {text}"
        self.records.event(kind, step=manifest.step, reason=text, seconds=seconds, bytes=manifest.size, **more)

    def _failure(self, slot: Path, step: int, error: Exception) -> CheckpointError:
        """Remove what was written of a slot, and say what is still there."""
        what = in_words(error) if isinstance(error, (OSError, SafetensorError)) else str(error)
        left = _remove_quietly(temporary_of(slot))
        whole = [path.name for path in slots.find_slots(self.folder)]
        kept = (
            f"Still there: {', '.join(whole)}; go on from it with --resume latest" if whole else "Nothing was saved yet"
        )
        message = f"cannot save {slot.name} at step {step} in {slot.parent}: {what}. {kept}{left}"
        try:
            self.records.event("warning", step=step, reason=message)
        except RawloopError as second:  # the disk that refuses the checkpoint may refuse the event too
            message += f". The event could not be written either: {second}"
        return CheckpointError(message)

    def _rotate(self, step: int) -> None:
        try:
            slots.rotate(self.folder, step, self.config.keep_last)
        except OSError as error:  # the save itself has succeeded
            self.records.event("warning", step=step, reason=f"an old checkpoint cannot be deleted: {in_words(error)}")

    def load(self, which: str | Path = "latest") -> Restored:
        """Restore every part from `latest`, the newest whole checkpoint of this run, or from the folder of a slot.

        Every rank verifies every file. A damaged slot is passed over for an older one on all ranks together, each
        with an event, but one that was asked for by its path is an error.

        Raises:
            UserError: there is no checkpoint, or no such folder.
            CheckpointError: no checkpoint is whole, or it does not hold exactly the parts of this run.
        """
        if which == "latest":
            slot = agree_on_latest(self.folder, self.world, self.records)
        else:
            slot = Path(which)
            self.world.together(lambda: check_slot(slot))
        manifest = self.world.together(lambda: self._restore(slot))
        assert manifest is not None
        self._settled_step = manifest.step
        self._last_size = manifest.size
        if self.world.is_main:
            reason = f"restored {slot}{changes(manifest.versions, self._versions)}"
            self.records.event("restore", step=manifest.step, reason=reason)
        return Restored(slot, manifest.step, manifest.meta, manifest.world_size)

    def _restore(self, slot: Path) -> Manifest:
        """Restore weights first and random streams last, because building the former may draw from the latter."""
        manifest = read_manifest(slot)
        check_parts(slot, manifest, {*self.states, *self.folders})
        for name, folder_part in self.folders.items():
            folder_part.load(slot / manifest.folders[name])
        for name, part in self.states.items():
            if name not in self.per_rank:
                part.load_state_dict(unpack(read_packed(slot / STATE, name)))
        for name, rank_part in self.per_rank.items():
            if self.world.rank < manifest.world_size:
                rank_part.load_state_dict(unpack(read_packed(slot / STATE, rank_file(name, self.world.rank))))
                continue
            rank_part.start_afresh(manifest.step)
            reason = f"{name} of this rank starts afresh: {manifest.world_size} rank(s) wrote the checkpoint"
            self.records.event("restore", step=manifest.step, reason=reason)
        return manifest


def _remove_quietly(temporary: Path) -> str:
    """Remove an unfinished slot after a failed write, or return a clause saying that it is still there."""
    try:
        discard(temporary)
    except OSError as error:
        return f". What was written of it is still in {temporary}: {in_words(error)}"
    return ""
