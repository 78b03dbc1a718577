"""Requests to stop: by a scheduler's SIGTERM or SIGUSR1, or by a file named STOP.

A signal only sets a flag, because it may come in the middle of an update or a save. The loop asks `wanted()` between
steps, agrees with the other ranks, and raises `Preempted`.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rawloop.errors import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STOP_FILE = "STOP"


class Preemption:
    """Says whether to stop.

    `stop_file` is looked for when asked, one `stat` a time, and so is `signal_file`, which launch/torchrun.py makes
    when it is told: its name is the signal's.
    """

    def __init__(self, stop_file: Path | None = None, signal_file: Path | None = None) -> None:
        self.stop_file, self.signal_file = stop_file, signal_file
        self.received: str | None = None  # the first signal's name; later ones change nothing

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """Remember a signal; this is the handler."""
        self.received = self.received or signal.Signals(number).name

    def wanted(self) -> str | None:
        """Return by what the run is to be stopped, or None."""
        if self.received is None and self.signal_file is not None and self.signal_file.exists():
            self.received = self.signal_file.name
        if self.received is None and self.stop_file is not None and self.stop_file.exists():
            return f"the file {self.stop_file}"
        return self.received


def end_early(command: str, go_on: str, exit_code_file: str | None) -> None:
    """Until signals are watched, end at once with exit code 75 on SIGTERM and SIGUSR1: nothing has begun yet.

    For a process that is rawloop's own, at its very start; torch is imported for seconds. The handlers come back when
    watching ends, and `ignore_signals` should follow.
    """

    def end(number: int, frame: FrameType | None) -> None:
        line = f"rawloop {command}: stopped by {signal.Signals(number).name} before it began{go_on}\n"
        os.write(2, line.encode())
        if exit_code_file:
            Path(exit_code_file).write_text(str(Preempted.exit_code))
        os._exit(Preempted.exit_code)

    for number in SIGNALS:
        signal.signal(number, end)


def ignore_signals() -> None:
    """Let no later signal change the exit code of a process that ends."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def watched(stop_file: Path | None = None, signal_file: Path | None = None) -> Iterator[Preemption]:
    """Remember SIGTERM and SIGUSR1 inside the block instead of dying of them. At its end all is put back as it was.

    Signals that were blocked until now, as the scripts in `launch/` leave SIGUSR1, are let in. Python lets only the
    main thread set handlers: in any other thread only files count.
    """
    preemption = Preemption(stop_file, signal_file)
    if threading.current_thread() is not threading.main_thread():
        yield preemption
        return
    before = {number: signal.signal(number, preemption.receive) for number in SIGNALS}
    blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        yield preemption
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def agreed(reasons: Sequence[str | None]) -> str | None:
    """Return why all ranks stop: the first rank's reason, and which rank that is where not all have one."""
    found = [(rank, reason) for rank, reason in enumerate(reasons) if reason is not None]
    if not found:
        return None
    rank, reason = found[0]
    return reason if len(found) == len(reasons) else f"{reason} on rank {rank}"


def left_to_the_parent() -> None:
    """In a helper process: obey SIGTERM only if it comes from the parent, and SIGUSR1 never.

    A scheduler and torchrun send them to helpers too, and a data worker that dies of one breaks the step in which its
    parent was to notice its own. A helper that ignored SIGTERM would outlive a parent that ends it when it exits.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if sys.platform == "linux":  # elsewhere a signal does not say whom it is from
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_wait_for_parent, args=(os.getppid(),), daemon=True).start()


def _wait_for_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
