"""Saves and restores a run. The manager knows neither models nor optimizers, only a dict of named parts with state.

A save is written into a temporary folder with a manifest of digests, forced to the disk, and renamed. An interrupted
save leaves the earlier checkpoints unchanged, and its temporary folder is never taken for a checkpoint.
"""

import math
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from operator import index
from pathlib import Path
from types import MappingProxyType
from typing import SupportsIndex

from rawloop.checkpoint import placing
from rawloop.checkpoint.best import BestRecord
from rawloop.checkpoint.config import CheckpointConfig as CheckpointConfig
from rawloop.checkpoint.parts import Parts
from rawloop.checkpoint.reader import Restored, choose, restore_parts
from rawloop.checkpoint.run_folder import RunLock, hold_lock
from rawloop.checkpoint.slots import CHECKPOINTS, best_record, find_slots, slot_name, step_of
from rawloop.checkpoint.writer import Capture, Save, save_slot
from rawloop.contracts import FolderState, Stateful
from rawloop.dist import World
from rawloop.errors import CheckpointError, RawloopError, UserError
from rawloop.files import readable, sync
from rawloop.records import Records
from rawloop.versions import changed_versions, installed_versions


class CheckpointManager:
    """Writes the parts in `state` to slots in a run folder and restores them.

    `state_dict` of every part is called on every rank. Rank 0 writes its own state of each part, and the states of all
    ranks of a part with `per_rank`. A `FolderState` writes its files on rank 0. An asynchronous `save` returns when the
    state is copied, and `poll` reports its result. A save waits for the previous one.

    Rank 0 holds the lock of the folder until `close`. Pass `lock` if rank 0 holds it already.

    Every rank must call the constructor, `start`, `save`, `ensure_saved`, `best_record`, `finish` and `load`.

    Raises:
        UserError: an object is no part, a state cannot be stored, or another process trains into the folder.
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
        self.folder, self.config, self.world, self.records = Path(folder), config, world, records
        parts = world.on_all_ranks(lambda: Parts(state))
        assert parts is not None
        self.parts = parts
        self.versions = installed_versions()
        self._capture = Capture(parts, world, self.versions, copy=config.asynchronous)
        self._saved_step = -1  # the last step that was saved or restored: saving it again would write the same state
        self._is_foreign = False  # the state was restored from another slot than this run's slot of that step
        self._last_size = 0  # bytes; 0 before the first save
        self._warned: set[str] = set()
        self._save: Save | None = None  # the last save, until it is reported
        self._failures: list[CheckpointError] = []  # in a row
        self._best_failure: CheckpointError | None = None  # of the last save of a best model; on rank 0
        self._lock = lock
        world.on_all_ranks(self._hold_lock, only_main=True)

    def _hold_lock(self) -> None:
        self._lock = hold_lock(self._lock, self.folder, self.world)
        self._warn(-1, *filter(None, [self._lock.notice]))

    def start(self, step: int) -> None:
        """Prepare the run folder for training from `step` on (0 in a new run). Call it after `load`, if that is called.

        Removes the leftovers of killed saves and moves checkpoints later than `step` aside. A state that was restored
        from elsewhere (a discarded slot, another run) is saved first, so that the run can be resumed whenever it ends.

        Raises:
            CheckpointError: that state could not be saved.
        """
        self.world.on_all_ranks(lambda: self._clean_up(step), only_main=True)
        if self._is_foreign:
            self.save(step)
            self.world.on_all_ranks(self._wait_for_success, only_main=True)
            self._is_foreign = False
        self.world.on_all_ranks(lambda: self._warn(step, *placing.continue_from(self.folder, step)), only_main=True)

    def _clean_up(self, step: int) -> None:
        self._hold_lock()
        (self.folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        sync(self.folder)
        self._warn(step, *placing.clean_up(self.folder), *placing.adopt_best(self.folder))

    def _warn(self, step: int, *warnings: str) -> None:
        """Record the warnings that have not been recorded before."""
        for warning in warnings:
            if warning not in self._warned:
                self._warned.add(warning)
                self.records.event("warning", step=step, reason=warning)

    def newest(self) -> Path | None:
        """Wait for a running save, and return the newest checkpoint of the run, if there is a readable one."""
        self._join()
        try:
            return next(iter(find_slots(self.folder)), None)
        except OSError:  # the caller reports another error, which matters more
            return None

    def _join(self) -> None:
        if self._save is not None:
            self._save.join()

    def due(self, step: int, last: bool) -> bool:
        """Return whether to save at `step`; `last` says that the run ends there."""
        wanted = placing.is_multiple(step, self.config.save_every) or (last and self.config.save_at_end)
        return wanted and step != self._saved_step

    def mark_changed(self) -> None:
        """Note that the state has changed since the last save or restore, although the step may be the same."""
        self._saved_step = -1

    def save(self, step: SupportsIndex, *, best: BestRecord | None = None) -> Path:
        """Write the checkpoint of `step`, then delete the oldest ones. Returns its folder.

        With `best`, the evaluation of this state, `best` then points to the checkpoint. If the checkpoint cannot be
        written, `best` stays where it was.

        Raises:
            UserError: `step` is not a whole number of 0 or more.
            CheckpointError: `max_failures` saves in a row failed; the earlier checkpoints are unchanged.
        """
        step = self._checked(step)
        if best is not None:
            best = best._replace(value=float(best.value), step=step)
            assert math.isfinite(best.value), f"{best.metric} is {best.value} at step {step}: that is never the best"
        start = time.perf_counter()
        self.world.on_all_ranks(self._prepare_save, only_main=True)
        contents = self._capture.take(step)
        slot = self._slot(step)
        if self.world.is_main:
            contents = replace(contents, best=best, gives_up=self._is_foreign)
            write = partial(save_slot, self.folder, contents, self.config, self._last_size)
            self._save = Save(slot, step, best, write)
            self._save.start()
            self._save.blocked = time.perf_counter() - start
        self._saved_step = step
        if not self.config.asynchronous:
            self.world.on_all_ranks(self.wait_until_written, only_main=True)
        return slot

    def _checked(self, step: SupportsIndex) -> int:
        """Return the step as an int; it may be a number of numpy or a tensor."""
        try:
            number = index(step)
        except TypeError:
            number = -1
        if number < 0:
            reason = f"the step of a checkpoint is {step!r}: it must be a whole number from 0 on"
            raise self.world.raised_on_all(UserError(reason))
        return number

    def _prepare_save(self) -> None:
        self._hold_lock()
        self.wait_until_written()

    def poll(self) -> None:
        """Report the last save if it has ended, without waiting for it. Only rank 0 has something to report.

        Raises:
            CheckpointError: `max_failures` saves in a row failed.
        """
        if self._save is not None and not self._save.is_alive():
            save, self._save = self._save, None
            self._report(save)

    def wait_until_written(self) -> None:
        """Wait for a running save, and report it; see `poll`."""
        with self.world.working():
            self._join()
        self.poll()

    def finish(self) -> None:
        """Wait for a running save. All ranks call this at the end of a run.

        Raises:
            CheckpointError: the last save has failed, or the last save of a best model.
        """
        self.world.on_all_ranks(self._wait_for_success, only_main=True)
        self.world.on_all_ranks(self._raise_best_failure, only_main=True)

    def _wait_for_success(self) -> None:
        self.wait_until_written()
        if self._failures:
            raise self._failures[-1]

    def _raise_best_failure(self) -> None:
        if self._best_failure is not None:
            reason = str(self._best_failure).partition(". Still there")[0]
            raise CheckpointError(f"all steps are done and saved, but not the best model: {reason}")

    def best_record(self) -> BestRecord | None:
        """Wait for a running save, and return the evaluation of the checkpoint that `best` points to."""
        self.world.on_all_ranks(self._join, only_main=True)
        return self.world.from_main(self.world.on_all_ranks(lambda: best_record(self.folder), only_main=True))

    def ensure_saved(self, step: int) -> Path:
        """Return the checkpoint of `step`, on the disk. It is written now if it does not exist.

        Raises:
            CheckpointError: it could not be written.
        """
        self.world.on_all_ranks(self.wait_until_written, only_main=True)
        slot = self._slot(step)
        saved = step == self._saved_step and not self._failures
        if not self.world.from_main(self.world.on_all_ranks(lambda: saved and slot.is_dir(), only_main=True)):
            self.save(step)
            self.world.on_all_ranks(self._wait_for_success, only_main=True)
        return slot

    def close(self) -> None:
        """Wait for a running save, and release the lock. The result of the save is an event."""
        try:
            self.wait_until_written()
        except CheckpointError as error:
            if error not in self._failures:  # its event could not be written
                print(f"rawloop: {error}", file=sys.stderr, flush=True)
        finally:
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    def _report(self, save: Save) -> None:
        """Record the result of a save that has ended."""
        try:
            manifest, seconds, warnings = save.result()
        except CheckpointError as error:
            self._best_failure = error if save.best is not None else self._best_failure
            self._report_failure(save, error)
            return
        self._failures.clear()
        size = self._last_size = manifest.size
        self._warn(save.step, *warnings)
        reason = f"wrote {save.slot.name} ({readable(size)} in {seconds:.2f} s)"
        self.records.event("save", step=save.step, reason=reason, seconds=seconds, blocked=save.blocked, bytes=size)
        if save.best is not None:
            self._best_failure, best = None, save.best
            reason = f"{best.metric} is {best.value:.6g}, the best so far: best points to {save.slot.name}"
            self.records.event("best", step=best.step, reason=reason, metric=best.metric, value=best.value)

    def _report_failure(self, save: Save, error: CheckpointError) -> None:
        """Record a failure, and raise it if it is the last one allowed."""
        self._failures.append(error)
        count, most = len(self._failures), self.config.max_failures
        more = "" if count >= most else f"; training continues, and ends after {most} failed saves in a row"
        try:
            self.records.event("warning", step=save.step, reason=f"{error}{more}")
        except RawloopError as second:  # a disk that refuses the checkpoint may refuse the event too
            raise CheckpointError(f"{error}. The event could not be written either: {second}") from error
        if count >= most:
            raise error

    def load(self, which: str | Path = "latest") -> Restored:
        """Restore every part from `latest`, the newest whole checkpoint of this run, or from the folder of a slot.

        It waits for a running save. One rank of each machine verifies every file. A damaged slot is skipped in favor of
        an older one on all ranks, and an event names it; a damaged slot that `which` names is an error.

        Raises:
            UserError: there is no checkpoint, or no such folder.
            CheckpointError: no checkpoint is whole, its parts are not those of this run, or see `poll`.
        """
        self.world.on_all_ranks(self.wait_until_written, only_main=True)  # the running save may replace the slot
        return self.restore(*choose(self.folder, which, self.world))

    def restore(self, slot: Path, damaged: Mapping[Path, str] = MappingProxyType({})) -> Restored:
        """Restore every part from a slot that `choose` has verified; report the damaged slots that it skipped.

        Raises:
            CheckpointError: the parts of the slot are not the parts of this run.
        """
        for skipped, why in damaged.items() if self.world.is_main else ():
            self.records.event("warning", step=step_of(skipped), reason=f"skipped a damaged checkpoint: {why}")
        manifest = restore_parts(slot, self.parts, self.world, self.records)
        expected = self._slot(manifest.step)
        self._is_foreign = slot.with_name(slot.name.removeprefix(".old-")).resolve() != expected.resolve()
        self._saved_step = -1 if self._is_foreign else manifest.step
        self._last_size = manifest.size
        if self.world.is_main:
            reason = f"restored {slot}{changed_versions(manifest.versions, self.versions)}"
            self.records.event("restore", step=manifest.step, reason=reason)
        return Restored(slot, manifest.step, manifest.world_size)

    def _slot(self, step: int) -> Path:
        return self.folder / CHECKPOINTS / slot_name(step)
