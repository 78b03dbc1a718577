"""What the ranks print: rank 0 to the console, every other rank into a file of the run."""

import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rawloop.dist import World
from rawloop.errors import RawloopError, UserError
from rawloop.records import EVENTS

FOLDER = "logs"


class RankLog:
    """The file of this rank's standard output and error, `logs/rank-N.txt` in the run folder; rank 0 has none."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.path: Path | None = None
        self._console: list[int] = []
        self._made = False  # whether there was no file of an earlier attempt

    def open(self, folder: Path) -> None:
        """From here on write into the file, after what earlier attempts have written.

        Raises:
            UserError: the folder is not rank 0's, or not writable here.
        """
        if self.world.is_main:
            return
        path, host = folder / FOLDER / f"rank-{self.world.rank}.txt", socket.gethostname()
        if not folder.is_dir():
            raise UserError(
                f"output is '{folder}', which {host} does not have: the machines of a run need a shared file system, "
                "mounted at the same path"
            )
        try:
            path.parent.mkdir(exist_ok=True)
            self._made = not path.exists()
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise UserError(
                f"output is '{folder}', and {host} cannot write into it: {error.strerror} ({error.filename}); all "
                "machines of a run write there"
            ) from error
        sys.stdout.flush()
        sys.stderr.flush()
        self._console = [os.dup(number) for number in (1, 2)]
        for number in (1, 2):
            os.dup2(file, number)
        os.close(file)
        self.path = path
        restart = f", restart {self.world.restarts}" if self.world.restarts else ""
        print(f"--- rank {self.world.rank} on {host}, process {os.getpid()}, {time.ctime()}{restart}", flush=True)

    def end(self, error: BaseException) -> None:
        """Write an error into the file. Remove the file if the command was refused before it was a run."""
        if self.path is None:
            return
        known = isinstance(error, RawloopError)
        sys.stderr.writelines([f"{type(error).__name__}: {error}\n"] if known else traceback.format_exception(error))
        if known and self._made and not (self.path.parent.parent / EVENTS).exists():
            self.path.unlink()
            with suppress(OSError):  # another rank's file is in it
                self.path.parent.rmdir()

    def close(self) -> None:
        """Write to the console again."""
        sys.stdout.flush()
        sys.stderr.flush()
        for number, console in zip((1, 2), self._console, strict=False):
            os.dup2(console, number)
            os.close(console)
        self._console = []


@contextmanager
def rank_log(world: World) -> Iterator[RankLog]:
    """Yield this rank's log. At the end of the block an error is written into it, and the console is back."""
    log = RankLog(world)
    try:
        yield log
    except BaseException as error:
        log.end(error)
        raise
    finally:
        log.close()
