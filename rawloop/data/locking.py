"""A lock, by which processes agree who writes a folder or a file."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from rawloop.errors import RawloopError, UserError


@contextmanager
def locked(file: Path, waiting: Callable[[], None] | None) -> Iterator[TextIO]:
    """Hold a lock, whose file this gives; see `open_cache`. The system frees it if the process ends.

    A process that takes the same lock a second time waits for itself.
    """
    folder = file.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(file, "a+")  # noqa: SIM115 - closed below, and by the system if the process is killed
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): set --data.codes to another folder") from error
    with lock:
        while not _try_lock(lock):
            if waiting is None:
                raise UserError(f"another `rawloop prepare` writes to {folder}: wait until it has ended")
            waiting()
            time.sleep(0.05)
        yield lock


def _try_lock(lock: TextIO) -> bool:
    import fcntl

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise RawloopError(f"{lock.name} cannot be locked: {error.strerror}") from error
    return True
