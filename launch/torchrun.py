"""torchrun that ends with the exit code of its workers and the cause of a failure; machines meet by rawloop.machines.

torchrun itself ends with 1, but 75 must reach the scheduler. A worker leaves its cause in torchrun's error file, and
the first worker of this machine its exit code in a file of ours. torchrun's own traceback and table are not printed.

SLURM sends SIGUSR1 to every process of a job. It would kill torchrun, and workers that are still importing; a worker
that ignored it would miss it. So it is blocked here, and the workers inherit that: it is pending until they unblock it.
If only torchrun receives it, torchrun makes a file that the workers look for, also those that start later.
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

TEMPORARY_FAILURE = 75  # EX_TEMPFAIL of sysexits.h
LOGS = "logs"  # folder that torchrun fills, and would else leave in the system's folder of temporary files
STOPPED = (TEMPORARY_FAILURE, 130)
QUIET = "TORCH_CPP_LOG_LEVEL"

sys.path.append(str(Path(__file__).resolve().parent.parent))  # for a rawloop that is not installed

from rawloop.machines import not_met, note, placed, say  # noqa: E402  # imports no torch


def run(arguments: list[str], folder: Path) -> int:
    """Run torchrun. If it fails, print the cause last and return the exit code of the worker that has failed first."""
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import main  # starts threads, which must inherit the blocked signals

    from rawloop.errors import RawloopError

    file = folder / "code"
    came: list[str] = []
    os.environ["RAWLOOP_EXIT_CODE_FILE"] = str(file)
    os.environ.pop(QUIET, None)  # torch has read it; the workers' warnings are shown
    try:
        main([f"--log-dir={folder / LOGS}", *placed(arguments, came, file)])
    except ChildFailedError as error:
        lines, code = failed(error)
        say("\n".join(lines))
        return code
    except SignalException as error:
        return left(folder, f"stopped by {error.sigval.name}") or stopped(error.sigval)
    except (RendezvousError, DistError) as error:
        return left(folder, "another machine has ended") or not_met(error, arguments, came)
    except RawloopError as error:
        note(str(error))
        return error.exit_code
    return 0


def left(folder: Path, what: str) -> int:
    """Return the exit code that the workers have left, and print it, or the cause of a failure; 0 without one.

    The cause is that of the earliest failure since the workers were last started.
    """
    file = folder / "code"
    code = int(file.read_text()) if file.exists() else 0
    attempts: dict[int, list[Any]] = {}
    for each in (folder / LOGS).glob("*/attempt_*/*/error.json"):
        attempt, rank = int(each.parts[-3].removeprefix("attempt_")), int(each.parts[-2])
        cause = json.loads(each.read_text())["message"]  # a bare text if torch has written it
        if isinstance(cause, dict):
            attempts.setdefault(attempt, []).append((int(cause["extraInfo"]["timestamp"]), rank, cause["message"]))
    if code not in (0, *STOPPED) and attempts:
        note(f"rank {min(attempts[max(attempts)])[1]} of this machine: {min(attempts[max(attempts)])[2]}")
    elif code:
        note(f"{what}; exit code {code} of the workers stands")
    return code


# -- what the processes have left --------------------------------------------------------------------------------


def failed(error: Any) -> tuple[list[str], int]:
    """Return a line for each process that failed by itself, the first failure last, and the exit code of that one.

    torchrun ended the others. A process that was killed by a signal has left no cause.
    """
    failures = error.failures
    first = min(failures, key=lambda rank: order(failures[rank]))
    until = order(failures[first])[1] + 1
    alone = [rank for rank in sorted(failures) if order(failures[rank]) < (1, 0) and failures[rank].timestamp <= until]
    others = [f"torchrun: rank {r} (process {failures[r].pid}) {ending(failures[r], r)}" for r in alone if r != first]
    failure = failures[first]
    how = "has stopped" if failure.exitcode in STOPPED else "failed first"
    last = f"torchrun: rank {first} (process {failure.pid}) {how}: {ending(failure, first)}"
    return [*others, last], max(failure.exitcode, 0) or 1


def order(failure: Any) -> tuple[int, int, bool]:
    """Return a key by which the first failure is the least: torchrun ends others by SIGTERM, and dates in seconds."""
    return failure.exitcode == -signal.SIGTERM, failure.timestamp, not isinstance(failure.message, dict)


def ending(failure: Any, rank: int) -> str:
    """Say how a process ended: the cause that it left, or the signal that has killed it."""
    where = f"logs/rank-{rank}.txt of the run folder" if rank else "above"
    if isinstance(failure.message, dict):
        bug = "py_callstack" in failure.message["extraInfo"]
        return f"{failure.message['message']}{f' (its traceback: {where})' if bug else ''}"
    if failure.exitcode >= 0:
        return f"it ended with exit code {failure.exitcode}; its output: {where}"
    known = {number.value: number.name for number in signal.Signals}
    cause = " (out of memory, or pre-empted?)" if failure.exitcode == -signal.SIGKILL else ""
    return f"it was killed by {known.get(-failure.exitcode, f'signal {-failure.exitcode}')}{cause}; its output: {where}"


def stopped(number: int) -> int:
    """Print that a signal stopped torchrun while no worker had written an exit code. Return the exit code."""
    note(f"stopped by {signal.Signals(number).name} before its processes said anything: start it again")
    return 130 if number == signal.SIGINT else TEMPORARY_FAILURE


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
    if QUIET not in os.environ:
        os.environ[QUIET] = "ERROR"  # pages of C++ frames when another machine has ended
    # until torchrun has a handler of its own
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(stopped(number)))
    with TemporaryDirectory() as made:
        pass_sigusr1_on(Path(made) / "SIGUSR1")
        # Else torchrun says at length that it misses it.
        os.environ.setdefault("TORCHELASTIC_ERROR_FILE", str(Path(made) / "error"))
        code = run(sys.argv[1:], Path(made))
    sys.exit(code)
