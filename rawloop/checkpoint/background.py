"""Saves that are written in threads of their own, one after another, while training goes on."""

import sys
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import NamedTuple

from safetensors import SafetensorError

from rawloop.checkpoint import placing, slots
from rawloop.checkpoint.best import BestRecord
from rawloop.checkpoint.config import CheckpointConfig
from rawloop.checkpoint.disk import check_space, in_words
from rawloop.checkpoint.manifest import Manifest
from rawloop.checkpoint.writer import Contents, discard, temporary_of, write_slot
from rawloop.errors import CheckpointError, RawloopError


class Written(NamedTuple):
    """A slot that is on the disk: what is in it, the seconds it took, and what the user should know."""

    manifest: Manifest
    seconds: float
    notes: list[str]


@dataclass
class Save:
    """One save under way, or ended. `held`: seconds for which training waited. `best`: what makes it the best."""

    slot: Path
    step: int
    future: Future[Written]
    thread: Thread
    held: float = 0.0
    best: BestRecord | None = None

    def result(self) -> Written:
        """What was written, or raise what prevented it."""
        return self.future.result()


class Saves:
    """The saves that were started and not yet reported, in order. Each has a thread, which waits for the one before.

    They are no daemons: Python waits for them when the process ends by itself, by an exception too. No executor: one
    takes no more work from then on. A failure that nobody asks about is told on stderr at the end.
    """

    def __init__(self) -> None:
        self._saves: list[Save] = []
        weakref.finalize(self, _tell_failures, self._saves)

    def __bool__(self) -> bool:
        return bool(self._saves)

    @property
    def newest(self) -> Save:
        """The save that was started last."""
        return self._saves[-1]

    def start(self, slot: Path, step: int, write: Callable[[], Written]) -> None:
        """Begin a save as soon as the one before has ended."""
        before, future = [save.future for save in self._saves], Future[Written]()
        thread = Thread(target=self._run, args=(before, future, write), name=f"rawloop-save-{step}")
        self._saves.append(Save(slot, step, future, thread))
        thread.start()

    def _run(self, before: list[Future[Written]], future: Future[Written], write: Callable[[], Written]) -> None:
        wait(before)
        try:
            future.set_result(write())
        except BaseException as error:  # whoever asks for the result gets it
            future.set_exception(error)

    def wait(self) -> None:
        """Wait until all threads have ended, well or not."""
        for save in self._saves:
            save.thread.join()

    def ended(self) -> Iterator[Save]:
        """Yield the saves that have ended, oldest first; they are no longer kept."""
        while self._saves and self._saves[0].future.done():
            yield self._saves.pop(0)


def _tell_failures(saves: list[Save]) -> None:
    for save in saves:
        error = save.future.exception() if save.future.done() else None
        if error is not None:
            text = str(error) if isinstance(error, RawloopError) else f"a save failed: {type(error).__name__}: {error}"
            print(f"rawloop: {text}", file=sys.stderr, flush=True)


def write_and_rotate(run: Path, contents: Contents, config: CheckpointConfig, expected: int) -> Written:
    """Write one slot, in any thread; touches the disk and nothing else of the process.

    Raises:
        CheckpointError: it could not be written; says what is still there.
    """
    begun = time.perf_counter()
    slot = run / slots.CHECKPOINTS / slots.slot_name(contents.step)
    try:
        check_space(run, expected)
        manifest = write_slot(slot, contents)
        said = placing.set_best(run, slot, contents.best) if contents.best is not None else []
        seconds = time.perf_counter() - begun
        return Written(manifest, seconds, [*said, *_rotate(run, contents.step, config)])
    except (OSError, SafetensorError, RawloopError) as error:
        raise _failure(slot, contents.step, run, error) from error


def _failure(slot: Path, step: int, run: Path, error: Exception) -> CheckpointError:
    """Remove what was written of a slot, and say what is still there."""
    what = in_words(error) if isinstance(error, (OSError, SafetensorError)) else str(error)
    left = _remove_quietly(temporary_of(slot))
    return CheckpointError(
        f"cannot save {slot.name} at step {step} in {slot.parent}: {what}. {_still_there(run)}{left}"
    )


def _still_there(run: Path) -> str:
    try:
        whole = [path.name for path in slots.find_slots(run)]
        best = slots.readable_best(run)
    except OSError as error:
        return f"What was saved before cannot be seen now: {in_words(error)}"
    if whole:
        return f"Still there: {', '.join(whole)}; go on from it with --resume latest"
    return f"Still there: {best}; go on from it with --resume {best}" if best else "Nothing was saved yet"


def _rotate(run: Path, step: int, config: CheckpointConfig) -> list[str]:
    try:
        placing.rotate(run, step, config.keep_last, config.keep_every)
    except OSError as error:  # the save itself has succeeded
        return [f"an old checkpoint cannot be deleted: {in_words(error)}"]
    return []


def _remove_quietly(temporary: Path) -> str:
    """Remove an unfinished slot after a failed write, or return a clause saying that it is still there."""
    try:
        discard(temporary)
    except OSError as error:
        return f". What was written of it is still in {temporary}: {in_words(error)}"
    return ""
