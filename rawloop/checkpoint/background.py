"""Saves that are written in threads of their own, one after another, while training goes on."""

import sys
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import NamedTuple

from rawloop.checkpoint.best import BestRecord
from rawloop.checkpoint.manifest import Manifest
from rawloop.errors import RawloopError


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
