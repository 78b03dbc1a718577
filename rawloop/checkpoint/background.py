"""Saves that are written in a thread of their own, one after another, while training goes on."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rawloop.checkpoint.manifest import Manifest


class Written(NamedTuple):
    """A slot that is on the disk: what is in it, the seconds it took, and what the user should know."""

    manifest: Manifest
    seconds: float
    notes: list[str]


@dataclass
class Save:
    """One save under way, or ended. `held` is the time in seconds for which it held training up."""

    slot: Path
    step: int
    future: Future[Written]
    held: float = 0.0

    def result(self) -> Written:
        """What was written, or raise what prevented it."""
        return self.future.result()


class Saves:
    """The saves that were started and not yet reported, in order. The thread ends with the last of them.

    It is no daemon: Python waits for it at exit, so that what was begun is finished unless the process is killed.
    """

    def __init__(self) -> None:
        self._saves: list[Save] = []
        self._pool: ThreadPoolExecutor | None = None

    def __bool__(self) -> bool:
        return bool(self._saves)

    @property
    def newest(self) -> Save:
        """The save that was started last."""
        return self._saves[-1]

    def start(self, slot: Path, step: int, write: Callable[[], Written]) -> None:
        """Begin a save as soon as the one before has ended."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="rawloop-save")
        self._saves.append(Save(slot, step, self._pool.submit(write)))

    def wait(self) -> None:
        """Wait until all have ended, well or not."""
        wait([save.future for save in self._saves])

    def ended(self) -> Iterator[Save]:
        """Yield the saves that have ended, oldest first; they are no longer kept."""
        while self._saves and self._saves[0].future.done():
            yield self._saves.pop(0)
        if not self._saves and self._pool is not None:
            self._pool.shutdown()
            self._pool = None
