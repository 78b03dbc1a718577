"""A script as somebody else's loop ends: `exits.py RUN CASE...` saves, and ends in the middle of writing, each way."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rawloop.checkpoint.config import CheckpointConfig
from rawloop.checkpoint.manager import CheckpointManager
from rawloop.dist import World
from rawloop.records import Records, RecordsConfig


class Slow:
    """Files whose writing has not begun to reach the disk when the script ends."""

    folder = "model"

    def __init__(self, refuses: bool) -> None:
        self.refuses = refuses

    def snapshot(self, copy: bool) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            time.sleep(0.3)
            if self.refuses:
                raise OSError(28, "No space left on device")
            (folder / "weights").write_text("x")

        return write

    def load(self, folder: Path) -> None:
        pass


def end(case: str, run: Path) -> None:
    records = Records(run, World(), RecordsConfig())
    manager = CheckpointManager(run, CheckpointConfig(), World(), records, {"model": Slow(case == "full disk")})
    manager.save(1)
    if case == "exit":
        sys.exit(3)
    if case == "exception":
        raise ValueError("of the loop's own")
    if case == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)


for case in sys.argv[2:]:
    child = os.fork()
    if child == 0:
        end(case, Path(sys.argv[1]) / case)
        break
    print(case, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
