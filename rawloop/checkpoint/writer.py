"""Writes a checkpoint: takes the state of all ranks, writes it into a temporary folder, and puts the folder in place.

The order is: files, the manifest, all of it forced to the disk, the rename, the rename forced to the disk. A kill at
any point leaves the slots as they were, or the finished one in its place.
"""

import shutil
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

from safetensors import SafetensorError

from rawloop.checkpoint import placing
from rawloop.checkpoint.best import BestRecord
from rawloop.checkpoint.config import CheckpointConfig
from rawloop.checkpoint.parts import Parts
from rawloop.checkpoint.slots import (
    CHECKPOINTS,
    STATE,
    Manifest,
    find_slots,
    rank_file,
    readable_best,
    slot_name,
    write_manifest,
)
from rawloop.dist import World
from rawloop.errors import CheckpointError, RawloopError
from rawloop.files import FileRecord, in_words, readable, remove_tree, sha256_file, sync_tree
from rawloop.host_memory import wait_for_copies
from rawloop.pack import Packed, has_shards, pack, write_packed


@dataclass(frozen=True)
class Contents:
    """A checkpoint in memory: the states of rank 0, and the states of every rank that differ between ranks.

    `folders` has, by part, the name of its folder and the function that writes it.
    """

    step: int
    versions: dict[str, str | None]
    states: dict[str, Packed]
    per_rank: list[dict[str, Packed]]
    folders: dict[str, tuple[str, Callable[[Path], None]]]
    best: BestRecord | None = None  # the evaluation of this step, if it is the best
    keep: bool = False  # rotation never deletes it
    gives_up: bool = False  # a slot of the same name belongs to another continuation


class Capture:
    """Takes the state of all parts, as it is at one step.

    With `copy`, states are copied to host memory, because training changes them while they are written. The buffers of
    the last save are reused.
    """

    def __init__(self, parts: Parts, world: World, versions: dict[str, str | None], *, copy: bool) -> None:
        self.parts, self.world, self.versions, self.copy = parts, world, versions, copy
        self._copies: dict[str, Packed] = {}

    def take(self, step: int) -> Contents:
        """Take the state of all parts on all ranks. The last save must be written. Errors are raised on all ranks."""
        sharded = any(getattr(part, "is_sharded", False) for part in self.parts.folders.values())
        # Shards are gathered from all ranks: the rank that fails says so and ends, and the others miss it.
        states = self._collect() if sharded else self.world.on_all_ranks(self._collect)
        assert states is not None
        every_rank = self.world.gather((step, {name: states[name] for name in self.parts.per_rank}))
        steps = [rank_step for rank_step, _ in every_rank]
        assert steps == [step] * self.world.size, f"ranks save different steps: {steps}"
        shared = {name: packed for name, packed in states.items() if name not in self.parts.per_rank}
        folders = self._snapshots() if sharded else self.world.on_all_ranks(self._snapshots, only_main=True)
        return Contents(step, self.versions, shared, [of_rank for _, of_rank in every_rank], folders or {})

    def _snapshots(self) -> dict[str, Any]:
        return {name: (part.folder, part.snapshot(self.copy)) for name, part in self.parts.folders.items()}

    def _collect(self) -> dict[str, Packed]:
        """Pack every state on rank 0, and on the others those per rank and those with shards: packing copies."""
        states = {name: part.state_dict() for name, part in self.parts.states.items()}
        main, per_rank = self.world.is_main, self.parts.per_rank
        wanted = [name for name, state in states.items() if main or name in per_rank or has_shards(state)]
        if not self.copy:
            return {name: pack(states[name]) for name in wanted}
        spare = {name: packed.tensors for name, packed in self._copies.items()}
        self._copies = {}  # after an error, some would be overwritten and some not
        self._copies = {name: pack(states[name], copy=True, spare=spare.get(name, {})) for name in wanted}
        wait_for_copies()
        return self._copies


class Written(NamedTuple):
    """A slot on the disk: its manifest, the seconds that writing took, and warnings for the user."""

    manifest: Manifest
    seconds: float
    warnings: list[str]


class Save(Thread):
    """A thread that writes one checkpoint. A failure is printed to stderr at the end if nobody has asked for `result`.

    It is no daemon, so Python waits for it at exit, and no executor's thread, because an executor takes no work while
    Python exits. `blocked` is the time in seconds for which training waited.
    """

    def __init__(self, slot: Path, step: int, best: BestRecord | None, write: Callable[[], Written]) -> None:
        super().__init__(name=f"rawloop-save-{step}")
        self.slot, self.step, self.best, self.blocked = slot, step, best, 0.0
        self._write = write
        self._future: Future[Written] = Future()
        self._unread = weakref.finalize(self, _print_failure, self._future)

    def run(self) -> None:
        """Write; called by `start`."""
        try:
            self._future.set_result(self._write())
        except BaseException as error:  # `result` raises it
            self._future.set_exception(error)

    def result(self) -> Written:
        """Return what was written, or raise the error that prevented it."""
        self._unread.detach()
        return self._future.result()


def _print_failure(future: Future[Written]) -> None:
    error = future.exception() if future.done() else None
    if error is not None:
        text = str(error) if isinstance(error, RawloopError) else f"a save failed: {type(error).__name__}: {error}"
        print(f"rawloop: {text}", file=sys.stderr, flush=True)


def wait_for_saves() -> None:
    """Wait for all running saves of this process."""
    for thread in threading.enumerate():
        if isinstance(thread, Save):
            thread.join()


def save_slot(run: Path, contents: Contents, config: CheckpointConfig, expected: int) -> Written:
    """Write one slot, point `best` to it if it is the best, and delete the oldest slots.

    It may run in any thread: it uses the disk and nothing else of the process. `expected` is the size in bytes.

    Raises:
        CheckpointError: the slot could not be written; the message names the checkpoints that still exist.
    """
    start = time.perf_counter()
    slot = run / CHECKPOINTS / slot_name(contents.step)
    try:
        check_space(run, expected)
        keep = placing.is_multiple(contents.step, config.keep_every)
        manifest = write_slot(slot, replace(contents, keep=keep))
        warnings = placing.set_best(run, slot, contents.best) if contents.best is not None else []
    except (OSError, SafetensorError, RawloopError) as error:
        reason = in_words(error) if isinstance(error, (OSError, SafetensorError)) else str(error)
        left = _remove_unfinished(_temporary(slot))
        raise CheckpointError(
            f"cannot save {slot.name} at step {contents.step} in {slot.parent}: {reason}. {_still_there(run)}{left}"
        ) from error
    seconds = time.perf_counter() - start
    try:
        placing.rotate(run, contents.step, config.keep_last, config.keep_every)
    except OSError as error:  # the save itself has succeeded
        warnings.append(f"an old checkpoint cannot be deleted: {in_words(error)}")
    return Written(manifest, seconds, warnings)


def check_space(folder: Path, needed: int) -> None:
    """Check that the disk of `folder` has 1.2 times `needed` bytes free.

    Raises:
        CheckpointError: it has less.
    """
    free = shutil.disk_usage(folder).free
    if free < needed * 1.2:
        raise CheckpointError(
            f"too little space on the disk of {folder}: the last checkpoint took {readable(needed)}, "
            f"{readable(free)} are free, and 1.2 times the last size must be"
        )


def _still_there(run: Path) -> str:
    try:
        whole = [path.name for path in find_slots(run)]
        best = readable_best(run)
    except OSError as error:
        return f"Earlier checkpoints cannot be read now: {in_words(error)}"
    if whole:
        return f"Still there: {', '.join(whole)}; continue from it with --resume latest"
    return f"Still there: {best}; continue from it with --resume {best}" if best else "Nothing was saved yet"


def _remove_unfinished(temporary: Path) -> str:
    """Remove an unfinished slot after a failed write, or return a clause that names it."""
    try:
        remove_tree(temporary) if temporary.exists() else None
    except OSError as error:
        return f". The unfinished checkpoint is still in {temporary}: {in_words(error)}"
    return ""


def write_slot(slot: Path, contents: Contents) -> Manifest:
    """Write a whole slot, put it in the place of an existing slot of that name, and return its manifest.

    Raises:
        OSError, SafetensorError, RawloopError: it could not be written. `slot` is unchanged, and the unfinished new
            slot is in a folder `.tmp-NAME`.
    """
    temporary = _temporary(slot)
    if temporary.exists():
        remove_tree(temporary)
    temporary.mkdir(parents=True)
    files = _write_states(temporary / STATE, contents)
    for name, write in contents.folders.values():
        files |= _write_folder(temporary / name, write)
    meta = {"best": contents.best._asdict()} if contents.best else {}
    manifest = Manifest(
        step=contents.step,
        world_size=len(contents.per_rank),
        states=sorted(contents.states),
        per_rank=sorted(contents.per_rank[0]),
        folders={part: name for part, (name, _) in contents.folders.items()},
        files=files,
        meta={**meta, "keep": True} if contents.keep else meta,
        versions=contents.versions,
    )
    write_manifest(temporary, manifest)
    sync_tree(temporary)
    placing.put_in_place(temporary, slot, gives_up=contents.gives_up, best=contents.best)
    return manifest


def _temporary(slot: Path) -> Path:
    return slot.with_name(f".tmp-{slot.name}")


def _write_states(folder: Path, contents: Contents) -> dict[str, FileRecord]:
    ranks = enumerate(contents.per_rank)
    of_ranks = {rank_file(name, rank): packed for rank, states in ranks for name, packed in states.items()}
    folder.mkdir()
    files: dict[str, FileRecord] = {}
    for name, packed in {**contents.states, **of_ranks}.items():
        files |= write_packed(packed, folder, name)
    return {f"{STATE}/{name}": record for name, record in files.items()}


def _write_folder(folder: Path, write: Callable[[Path], None]) -> dict[str, FileRecord]:
    """Let a part write its folder, and hash all files in it by reading them."""
    folder.mkdir()
    write(folder)
    records = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise CheckpointError(f"{path} is no plain file, and a checkpoint holds nothing else")
        if path.is_file():
            records[path.relative_to(folder.parent).as_posix()] = FileRecord(path.stat().st_size, sha256_file(path))
    if not records:
        raise CheckpointError(f"nothing was written into {folder}")
    return records
