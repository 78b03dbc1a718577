"""torchrun with the exit code of its workers: torchrun itself ends with 1, but 75 must reach the scheduler.

The first worker of this machine writes its exit code to a file. A worker that crashes writes none: then one line for
each failed worker says how it ended, and the exit code is 1. torchrun's own traceback, which would hide the workers'
messages, is not printed.

SLURM sends SIGUSR1 to every process of a job. It would kill torchrun, and workers that are still importing; a worker
that ignored it would miss it. So it is blocked here, and the workers inherit that: it is pending until they unblock it.
If only torchrun receives it, torchrun makes a file that the workers look for, also those that start later.
"""

import os
import signal
import sys
import threading
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

TEMPORARY_FAILURE = 75  # EX_TEMPFAIL of sysexits.h


def run(arguments: list[str], folder: Path) -> int:
    """Run torchrun. If it fails, return the exit code that a worker has written into `folder`, or 1."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main  # starts threads, which must inherit the blocked signals

    file = folder / "code"
    os.environ["RAWLOOP_EXIT_CODE_FILE"] = str(file)
    try:
        main(arguments)
    except Exception as error:
        code = file.read_text() if file.exists() else "0"
        if code in ("0", "1") and isinstance(error, ChildFailedError):
            print("\n".join(failed(error, folder / "first")), file=sys.stderr)
            return 1
        if code == "0" and isinstance(error, SignalException):
            return stopped(error.sigval)
        if code in ("0", "1") and not isinstance(error, SignalException):
            raise
        print(f"torchrun: {type(error).__name__}; exit code {code} of the workers stands", file=sys.stderr)
        return int(code)
    return 0


def failed(error: Any, file: Path) -> list[str]:
    """Return a line for each process that failed by itself, the first failure first. torchrun ended the others."""
    _, first = error.get_first_failure()
    by_torchrun = signal.SIGTERM if first.exitcode != -signal.SIGTERM else 0
    alone = {
        rank: failure
        for rank, failure in sorted(error.failures.items())
        if failure.exitcode != -by_torchrun and failure.timestamp <= first.timestamp + 1
    }
    rank = int(file.read_text()) if file.exists() else None  # a process that was killed has written none
    lines = [f"torchrun: rank {r} (process {f.pid}) {ending(f.exitcode)}" for r, f in alone.items() if r != rank]
    if rank in alone:
        lines.insert(
            0, f"torchrun: rank {rank} (process {alone[rank].pid}) failed first: {ending(alone[rank].exitcode)}"
        )
    return lines


def stopped(number: int) -> int:
    """Print that a signal stopped torchrun while no worker had written an exit code. Return the exit code."""
    name = signal.Signals(number).name
    print(f"torchrun: stopped by {name} before its processes said anything: start it again", file=sys.stderr)
    return 130 if number == signal.SIGINT else TEMPORARY_FAILURE


def ending(exitcode: int) -> str:
    """Say how a process ended. Its exit code is negative if a signal has killed it."""
    if exitcode >= 0:
        return f"ended with exit code {exitcode}: its own message is above"
    known = {number.value: number.name for number in signal.Signals}
    cause = ": out of memory, or pre-empted?" if exitcode == -signal.SIGKILL else ""
    return f"was killed by {known.get(-exitcode, f'signal {-exitcode}')}{cause}"


def pass_sigusr1_on(file: Path) -> None:
    """Block SIGUSR1 in this process and its workers. When it arrives, make `file`, which the workers look for."""
    os.environ["RAWLOOP_SIGNAL_FILE"] = str(file)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # the scripts ignore it, and an ignored signal is never pending

    def wait() -> None:
        signal.sigwait({signal.SIGUSR1})
        file.touch()

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    # until torchrun has a handler of its own
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(stopped(number)))
    with TemporaryDirectory() as made:
        pass_sigusr1_on(Path(made) / "SIGUSR1")
        code = run(sys.argv[1:], Path(made))
    sys.exit(code)
