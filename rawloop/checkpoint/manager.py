"""Saves and restores a run. It knows nothing of models or optimizers: only a dict of named parts that have state.

A save is written into a temporary folder, forced to the disk, sealed by a manifest with digests, and renamed. Whatever
happens in between, what was saved before stays, and nothing half-written is ever taken for a checkpoint.
"""

import math
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from operator import index
from pathlib import Path
from typing import NamedTuple, SupportsIndex

from rawloop.checkpoint import placing, slots
from rawloop.checkpoint.background import Save, Saves, Written, write_and_rotate
from rawloop.checkpoint.best import BestRecord
from rawloop.checkpoint.capture import Capture, Parts
from rawloop.checkpoint.config import CheckpointConfig as CheckpointConfig
from rawloop.checkpoint.disk import readable
from rawloop.checkpoint.manifest import step_of
from rawloop.checkpoint.reader import Chosen, changes, choose, restore_parts
from rawloop.checkpoint.run_folder import RunLock
from rawloop.contracts import FolderState, Stateful
from rawloop.dist import World
from rawloop.errors import CheckpointError, RawloopError, UserError
from rawloop.files import sync
from rawloop.launcher import read_ranks
from rawloop.records import Records


class Restored(NamedTuple):
    """What was loaded: the slot, its step, and the number of ranks that wrote it."""

    slot: Path
    step: int
    world_size: int


class CheckpointManager:
    """Writes the parts in `state` to slots in a run folder and reads them back.

    `state_dict` of every part is called on every rank; what rank 0 returns is written, except for parts with
    `per_rank`, of which every rank's is. A `FolderState` writes its files on rank 0. Where saving is asynchronous,
    `save` returns when the state is copied, and `poll` tells what became of it; a save waits for the one before.

    Rank 0 holds the folder's lock until `close`. `lock` is the one that it has already, if it has one.

    Making one, `start`, `save`, `secure`, `best_record`, `finish` and `load` must be called on every rank.

    Raises:
        UserError: a part is none, or cannot be stored as it is; or another process trains into the folder.
    """

    def __init__(
        self,
        folder: str | Path,
        config: CheckpointConfig,
        world: World,
        records: Records,
        state: Mapping[str, Stateful | FolderState],
        lock: RunLock | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.config = config
        self.world = world
        self.records = records
        parts = world.on_all_ranks(lambda: Parts(state))
        assert parts is not None
        self.parts = parts
        self._capture = Capture(self.parts, world, copy=config.asynchronous)
        self._settled_step = -1  # saved or restored last: saving it again would write the same thing
        self._elsewhere = False  # restored from a slot that is not this run's own of that step
        self._last_size = 0  # bytes; not known before the first save
        self._warned: set[str] = set()
        self._saves = Saves()
        self._failures: list[CheckpointError] = []  # in a row
        self._best_failure: CheckpointError | None = None  # the last save of a best model failed; known to rank 0
        self._lock = lock
        world.on_all_ranks(self._hold_lock, only_main=True)

    def _hold_lock(self) -> None:
        """Take the folder's lock, or take it again; see `RunLock.renew`."""
        try:
            if self._lock is not None:
                self._lock.renew()
                return
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = RunLock(self.folder)
        except UserError as error:
            launched = read_ranks()[1]
            if launched == 1 or self.world.size > 1:
                raise
            advice = "hand every part the World that open_world gives; World() is a process on its own"
            raise UserError(
                f"{error}. This is one of {launched} processes that were started together: {advice}"
            ) from None
        if self._lock.notice is not None:
            self.records.event("warning", step=-1, reason=self._lock.notice)

    def start(self, step: int) -> None:
        """Make the run folder ready for training on from `step` (0 in a new run); after `load`, if there is one.

        Removes what dead saves have left and moves checkpoints later than `step` aside. A state that came from
        elsewhere (a discarded slot, another run) is saved first, so that the run can be gone on with
        whenever it ends, and a slot of another continuation is not taken for its own.

        Raises:
            CheckpointError: it could not be saved.
        """
        self.world.on_all_ranks(lambda: self._make_ready(step), only_main=True)
        if self._elsewhere:
            self.save(step)
            self.world.on_all_ranks(self._last_succeeded, only_main=True)
            self._elsewhere = False
        self.world.on_all_ranks(lambda: self._start(step), only_main=True)

    def _make_ready(self, step: int) -> None:
        self._hold_lock()
        (self.folder / slots.CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        sync(self.folder)
        for sentence in [*placing.clean_up(self.folder), *placing.adopt_best(self.folder, step)]:
            self._warn(step, sentence)

    def _start(self, step: int) -> None:
        for moved in placing.set_aside(self.folder, step):
            reason = f"going on from step {step}: moved a checkpoint of what was given up to {moved}"
            self.records.event("warning", step=step, reason=reason)
        for sentence in placing.mend_best(self.folder):
            self._warn(step, sentence)
        best = slots.best_record(self.folder)
        if best is not None and best.step > step:
            reason = f"going on from step {step}: the best checkpoint so far is of step {best.step}"
            self.records.event("warning", step=step, reason=reason)

    def _warn(self, step: int, sentence: str) -> None:
        """Record a warning, unless it has been given before."""
        if sentence not in self._warned:
            self._warned.add(sentence)
            self.records.event("warning", step=step, reason=sentence)

    def newest(self) -> Path | None:
        """Return the newest checkpoint of the run, if one can be seen. A save under way is waited for."""
        self._saves.wait()
        try:
            return next(iter(slots.find_slots(self.folder)), None)
        except OSError:  # asked when something else has failed, which is to be told
            return None

    def due(self, step: int, last: bool) -> bool:
        """Return whether to save at `step`; `last` says that the run ends here."""
        if step == self._settled_step:
            return False
        if last and self.config.save_at_end:
            return True
        return self.config.save_every > 0 and step > 0 and step % self.config.save_every == 0

    def changed(self) -> None:
        """Say that the state differs from what was saved or restored last, even if the step is still the same."""
        self._settled_step = -1

    def save(self, step: SupportsIndex, *, best: BestRecord | None = None) -> Path:
        """Write the checkpoint of `step`, then delete the oldest ones. Returns its folder.

        With `best`, the evaluation of this state, `best` then points to the checkpoint. If it cannot be written, `best`
        stays where it was.

        Raises:
            UserError: `step` is not a whole number of 0 or more.
            CheckpointError: `max_failures` in a row could not be written; what was saved before is untouched.
        """
        step = self._checked(step)
        if best is not None:
            best = best._replace(value=float(best.value), step=step)
            assert math.isfinite(best.value), f"{best.metric} is {best.value} at step {step}: that is never the best"
        begun = time.perf_counter()
        contents = self._capture.take(step, self._before_copy)
        slot = self._slot(step)
        if self.world.is_main:
            keep = placing.is_kept(step, self.config.keep_every)
            contents = replace(contents, best=best, keep=keep, gives_up=self._elsewhere)
            self._saves.start(
                slot, step, partial(write_and_rotate, self.folder, contents, self.config, self._last_size)
            )
            self._saves.newest.best = best
            self._saves.newest.held = time.perf_counter() - begun
        self._settled_step = step
        if not self.config.asynchronous:
            self.world.on_all_ranks(self.settle, only_main=True)
        return slot

    def _checked(self, step: SupportsIndex) -> int:
        """The step as Python's own number, of numpy's or a tensor's too."""
        try:
            number = index(step)
        except TypeError:
            number = -1
        if number < 0:
            reason = f"the step of a checkpoint is {step!r}: it must be a whole number from 0 on"
            raise self.world.raised_on_all(UserError(reason))
        return number

    def _before_copy(self) -> None:
        self._hold_lock()
        self.settle()

    def poll(self) -> None:
        """Report the saves that have ended since; without waiting for any. Only rank 0 has something to report.

        Raises:
            CheckpointError: `max_failures` saves in a row have failed.
        """
        for save in self._saves.ended():
            self._settle(save)

    def settle(self) -> None:
        """Wait for the saves under way, and report them; see `poll`."""
        with self.world.working():
            self._saves.wait()
        self.poll()

    def finish(self) -> None:
        """Wait for the saves under way. All ranks call this at the end of a run.

        Raises:
            CheckpointError: the last save has failed, or that of the best model.
        """
        self.world.on_all_ranks(self._finish, only_main=True)

    def _finish(self) -> None:
        self._last_succeeded()
        if self._best_failure is not None:
            what = str(self._best_failure).partition(". Still there")[0]
            raise CheckpointError(f"all steps are done and saved, but not the best model: {what}")

    def _last_succeeded(self) -> None:
        self.settle()
        if self._failures:
            raise self._failures[-1]

    def best_record(self) -> BestRecord | None:
        """Return the evaluation of the checkpoint that `best` points to. Waits for saves under way."""
        return self.world.from_main(self.world.on_all_ranks(self._best_record, only_main=True))

    def _best_record(self) -> BestRecord | None:
        self._saves.wait()
        return slots.best_record(self.folder)

    def secure(self, step: int) -> Path:
        """Return the checkpoint of `step`, which is whole and on the disk; write it now if it is not there.

        Raises:
            CheckpointError: it could not be written.
        """
        self.world.on_all_ranks(self.settle, only_main=True)
        slot = self._slot(step)
        settled = step == self._settled_step and not self._failures
        there = self.world.on_all_ranks(lambda: settled and slot.is_dir(), only_main=True)
        if not self.world.from_main(there):
            self.save(step)
            self.world.on_all_ranks(self._last_succeeded, only_main=True)
        return slot

    def close(self) -> None:
        """Wait for the saves under way, and let others train into the folder. What becomes of the saves is an event."""
        try:
            self.settle()
        except CheckpointError as error:
            if error not in self._failures:  # those are told by their events, of which this one could not be written
                print(f"rawloop: {error}", file=sys.stderr, flush=True)
        finally:
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    def _settle(self, save: Save) -> None:
        try:
            written = save.result()
        except CheckpointError as error:
            self._failures.append(error)
            if save.best is not None:
                self._best_failure = error
            self._tell_failure(save, error)
            return
        self._failures.clear()
        if save.best is not None:
            self._best_failure = None
        self._last_size = written.manifest.size
        for sentence in written.notes:
            self._warn(written.manifest.step, sentence)
        self._report(save, written)

    def _tell_failure(self, save: Save, error: CheckpointError) -> None:
        """Say it in an event, and raise it if it is one too many."""
        count, most = len(self._failures), self.config.max_failures
        more = "" if count >= most else f"; training goes on, and ends after {most} failed saves in a row"
        try:
            self.records.event("warning", step=save.step, reason=f"{error}{more}")
        except RawloopError as second:  # the disk that refuses the checkpoint may refuse the event too
            raise CheckpointError(f"{error}. The event could not be written either: {second}") from error
        if count >= most:
            raise error

    def _report(self, save: Save, written: Written) -> None:
        manifest, seconds, best = written.manifest, written.seconds, save.best
        text = f"wrote {save.slot.name} ({readable(manifest.size)} in {seconds:.2f} s)"
        numbers = {"seconds": seconds, "held": save.held, "bytes": manifest.size}
        self.records.event("save", step=manifest.step, reason=text, **numbers)
        if best is not None:
            text = f"{best.metric} is {best.value:.6g}, the best so far: best points to {save.slot.name}"
            self.records.event("best", step=best.step, reason=text, metric=best.metric, value=best.value)

    def load(self, which: str | Path = "latest") -> Restored:
        """Restore every part from `latest`, the newest whole checkpoint of this run, or from the folder of a slot.

        It waits for saves under way. One rank of each machine verifies every file. A damaged slot is passed over for
        an older one on all ranks, each with an event; one that is named by its path is an error.

        Raises:
            UserError: there is no checkpoint, or no such folder.
            CheckpointError: no checkpoint is whole, it does not hold exactly the parts of this run, or see `poll`.
        """
        self.world.on_all_ranks(self.settle, only_main=True)  # else the slot of a save under way is the one before it
        return self.restore(choose(self.folder, which, self.world))

    def restore(self, chosen: Chosen) -> Restored:
        """Restore every part from a slot that `choose` has verified, and tell which ones it has passed over.

        Raises:
            CheckpointError: it does not hold exactly the parts of this run.
        """
        for slot, why in chosen.passed_over.items() if self.world.is_main else ():
            self.records.event("warning", step=step_of(slot), reason=f"passed over a checkpoint: {why}")
        slot = chosen.slot
        manifest = restore_parts(slot, self.parts, self.world, self.records)
        own = self._slot(manifest.step)
        self._elsewhere = slot.with_name(slot.name.removeprefix(".old-")).resolve() != own.resolve()
        self._settled_step = -1 if self._elsewhere else manifest.step
        self._last_size = manifest.size
        if self.world.is_main:
            reason = f"restored {slot}{changes(manifest.versions, self._capture.versions)}"
            self.records.event("restore", step=manifest.step, reason=reason)
        return Restored(slot, manifest.step, manifest.world_size)

    def _slot(self, step: int) -> Path:
        return self.folder / slots.CHECKPOINTS / slots.slot_name(step)
