"""Requests to stop: SIGTERM or SIGUSR1 from a scheduler, or a file named STOP. SIGUSR2 asks for a capsule.

A signal only sets a flag, because it may arrive during an update or a save. Between steps the loop calls `wanted()`,
agrees with the other ranks, and raises `Preempted`.
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
KEEP = signal.SIGUSR2  # asks for a capsule of the step that is under way
STOP_FILE = "STOP"


class Preemption:
    """Says whether the run should stop.

    Each call of `wanted` looks for `stop_file` and for `signal_file`. launch/torchrun.py makes the latter when it
    receives a signal, and names it after the signal.
    """

    def __init__(self, stop_file: Path | None = None, signal_file: Path | None = None) -> None:
        self.stop_file, self.signal_file = stop_file, signal_file
        self.received: str | None = None  # name of the first signal; later signals change nothing
        self.keep = False  # a capsule was asked for

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """Remember a signal. This is the signal handler."""
        self.received = self.received or signal.Signals(number).name

    def receive_keep(self, number: int, frame: FrameType | None = None) -> None:
        """Remember that a capsule was asked for. This is a signal handler."""
        self.keep = True

    def wanted(self) -> str | None:
        """Return what asks the run to stop, or None."""
        if self.received is None and self.signal_file is not None and self.signal_file.exists():
            self.received = self.signal_file.name
        if self.received is None and self.stop_file is not None and self.stop_file.exists():
            return f"the file {self.stop_file}"
        return self.received


def exit_on_signals(command: str, advice: str, exit_code_file: str | None) -> None:
    """On SIGTERM and SIGUSR1 exit at once with code 75, until `watch_signals` sets its handlers.

    For the first seconds of rawloop's own process, in which torch is imported and there is nothing to save. Afterwards
    these handlers are back: call `ignore_signals`.
    """

    def end(number: int, frame: FrameType | None) -> None:
        line = f"rawloop {command}: stopped by {signal.Signals(number).name} before it began{advice}\n"
        os.write(2, line.encode())
        if exit_code_file:
            Path(exit_code_file).write_text(str(Preempted.exit_code))
        os._exit(Preempted.exit_code)

    for number in SIGNALS:
        signal.signal(number, end)


def ignore_signals() -> None:
    """Ignore both signals, so that they cannot change the exit code of a process that is about to end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def watch_signals(stop_file: Path | None = None, signal_file: Path | None = None) -> Iterator[Preemption]:
    """Remember SIGTERM, SIGUSR1 and SIGUSR2 inside the block; at its end restore the handlers that were set before.

    Blocked signals are unblocked inside (launch/torchrun.py blocks SIGUSR1). Python sets signal handlers only in
    the main thread: in any other thread only the two files count.
    """
    preemption = Preemption(stop_file, signal_file)
    if threading.current_thread() is not threading.main_thread():
        yield preemption
        return
    before = {number: signal.signal(number, preemption.receive) for number in SIGNALS}
    before[KEEP] = signal.signal(KEEP, preemption.receive_keep)
    blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        yield preemption
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def first_reason(reasons: Sequence[str | None]) -> str | None:
    """Return the first rank's reason to stop, or None. It names that rank unless all ranks have a reason."""
    found = [(rank, reason) for rank, reason in enumerate(reasons) if reason is not None]
    if not found:
        return None
    rank, reason = found[0]
    return reason if len(found) == len(reasons) else f"{reason} on rank {rank}"


def leave_signals_to_parent() -> None:
    """In a data worker: ignore SIGUSR1, and obey SIGTERM only if the parent has sent it.

    Schedulers and torchrun send both to data workers too. A worker that ended would break the step of its parent; a
    worker that ignored SIGTERM would outlive a parent that terminates it at exit.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if sys.platform == "linux":  # elsewhere the sender of a signal is unknown
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_wait_for_parent, args=(os.getppid(),), daemon=True).start()


def _wait_for_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
