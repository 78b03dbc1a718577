"""torchrun, except that it ends with the exit code of its workers: 75 must reach the scheduler, torchrun makes it 1.

The workers' first process on this machine writes its code into a file; torchrun itself keeps only that one has failed.
A crash leaves no code: then a line says of each process that has failed how it ended, and the exit code is 1. A
traceback of torchrun's own would hide what the process itself has said.

SLURM sends SIGUSR1 to every process of a job. torchrun would die of it, and so would a worker that is still importing;
one that ignored it would not learn of it. So it is blocked here, and workers inherit that: it waits until they take it.
Sent to torchrun alone, it is passed on: as a file that workers look for, so that those that start later find it too.
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
    """Run torchrun; return the exit code that the workers left in `folder`, if it has failed, or 1."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main  # starts threads, which must inherit what is blocked

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
    """A line per process that has failed by itself, the first one first; torchrun ended the others afterwards."""
    _, first = error.get_first_failure()
    told = signal.SIGTERM if first.exitcode != -signal.SIGTERM else 0
    own = {
        rank: failure
        for rank, failure in sorted(error.failures.items())
        if failure.exitcode != -told and failure.timestamp <= first.timestamp + 1
    }
    rank = int(file.read_text()) if file.exists() else None  # a process that was killed has left none
    lines = [f"torchrun: rank {r} (process {f.pid}) {ending(f.exitcode)}" for r, f in own.items() if r != rank]
    if rank in own:
        lines.insert(0, f"torchrun: rank {rank} (process {own[rank].pid}) failed first: {ending(own[rank].exitcode)}")
    return lines


def stopped(number: int) -> int:
    """Say that torchrun was told to stop, where no worker has left a code: it had not begun, or was killed."""
    name = signal.Signals(number).name
    print(f"torchrun: stopped by {name} before its processes said anything: start it again", file=sys.stderr)
    return 130 if number == signal.SIGINT else TEMPORARY_FAILURE


def ending(exitcode: int) -> str:
    """How a process ended, from its exit code, which is minus the signal that has killed it."""
    if exitcode >= 0:
        return f"ended with exit code {exitcode}: its own message is above"
    known = {number.value: number.name for number in signal.Signals}
    cause = ": out of memory, or pre-empted?" if exitcode == -signal.SIGKILL else ""
    return f"was killed by {known.get(-exitcode, f'signal {-exitcode}')}{cause}"


def pass_sigusr1_on(file: Path) -> None:
    """Block SIGUSR1 in this process and in those that it starts; make `file`, which workers look for, once it comes."""
    os.environ["RAWLOOP_SIGNAL_FILE"] = str(file)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # ignored, as the scripts leave it, it would be lost

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
