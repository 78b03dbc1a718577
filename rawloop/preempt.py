"""Requests to stop: SIGTERM or SIGUSR1 from a scheduler, Ctrl-C, or a file named STOP. SIGUSR2 asks for a capsule.

A signal only sets a flag, because it may arrive during an update or a save. Between steps the loop calls `wanted()`,
agrees with the other ranks, and raises `Preempted`.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rawloop.errors import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
KEEP = signal.SIGUSR2  # asks for a capsule of the step that is under way
STOP_FILE = "STOP"
CTRL_C = "Ctrl-C"
INTERRUPTED = 130  # exit code after Ctrl-C: nobody should start the run again by itself
AGAIN = 0.5  # seconds after the first Ctrl-C in which another signal is part of it: launchers may send it twice


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
        self.received = self.received or (CTRL_C if number == signal.SIGINT else signal.Signals(number).name)

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


@contextmanager
def watch_ctrl_c(preemption: Preemption, say: Callable[[str], None], end: Callable[[], object]) -> Iterator[None]:
    """Inside the block the first Ctrl-C asks the run to stop, and the second calls `end`, in another thread.

    The thread reads what Python's C handler writes, so neither waits for an operation that takes long. torchrun sends
    its processes SIGINT for the first Ctrl-C, and SIGTERM for the second. Ctrl-C stays what it is in a thread, and
    where it is ignored (`nohup`, a job in the background of a script).
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.signal(signal.SIGINT, lambda number, frame: None)
    handle = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=_count_ctrl_c, args=(reader, preemption, say, end), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(handle)
        signal.signal(signal.SIGINT, before)
        writer.shutdown(socket.SHUT_WR)  # data workers have copies of it, which closing would leave open
        thread.join()
        writer.close()
        reader.close()


def _count_ctrl_c(
    reader: socket.socket, preemption: Preemption, say: Callable[[str], None], end: Callable[[], object]
) -> None:
    first: float | None = None
    while numbers := reader.recv(64):
        for number in numbers:
            if first is None and number == signal.SIGINT:
                first = time.monotonic()
                preemption.receive(signal.SIGINT)
                say(f"{CTRL_C}: the run saves its state after this step and ends; press {CTRL_C} again to end at once")
            elif first and number in (signal.SIGINT, signal.SIGTERM) and time.monotonic() > first + AGAIN:
                end()


def exit_code_after(reason: str) -> int:
    """Return the exit code of a run that was stopped for this reason."""
    return INTERRUPTED if reason.startswith(CTRL_C) else Preempted.exit_code


def first_reason(reasons: Sequence[str | None]) -> str | None:
    """Return the first rank's reason to stop, or None. It names that rank unless all ranks have a reason."""
    found = [(rank, reason) for rank, reason in enumerate(reasons) if reason is not None]
    if not found:
        return None
    rank, reason = found[0]
    return reason if len(found) == len(reasons) else f"{reason} on rank {rank}"


def leave_signals_to_parent() -> None:
    """In a data worker: ignore SIGUSR1 and Ctrl-C, and obey SIGTERM only if the parent has sent it.

    Schedulers, torchrun and terminals send them to data workers too. A worker that ended would break the step of its
    parent; a worker that ignored SIGTERM would outlive a parent that terminates it at exit.
    """
    signal.set_wakeup_fd(-1)  # the parent's, if it watches Ctrl-C
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":  # elsewhere the sender of a signal is unknown
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_wait_for_parent, args=(os.getppid(),), daemon=True).start()


def _wait_for_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
