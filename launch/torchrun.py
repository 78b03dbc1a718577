"""torchrun that ends with the exit code of its workers and the cause of a failure, on machines with any network.

torchrun itself ends with 1, but 75 must reach the scheduler. A worker leaves its cause in torchrun's error file, and
the first worker of this machine its exit code in a file of ours. torchrun's own traceback and table are not printed.

torchrun guesses from host names which machine hosts the store, and gloo which interface leads to the others. Both are
wrong on many clusters. So they are found out here, from the address of --rdzv-endpoint.

SLURM sends SIGUSR1 to every process of a job. It would kill torchrun, and workers that are still importing; a worker
that ignored it would miss it. So it is blocked here, and the workers inherit that: it is pending until they unblock it.
If only torchrun receives it, torchrun makes a file that the workers look for, also those that start later.
"""

import os
import pickle
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

TEMPORARY_FAILURE = 75  # EX_TEMPFAIL of sysexits.h
SIGNS = 20  # seconds in which a machine that lives gives a sign; torchrun's interval is 5
LOST = 60  # seconds without the store and without processes, after which torchrun is ended
JOIN = 600.0  # torchrun's own join_timeout, in seconds
STOPPED = (TEMPORARY_FAILURE, 130)
QUIET = "TORCH_CPP_LOG_LEVEL"
ENDPOINT, CONF, ID, NODES = "--rdzv-endpoint=", "--rdzv-conf=", "--rdzv-id=", "--nnodes="
ADDRESS = "--local-addr="

sys.path.append(str(Path(__file__).resolve().parent.parent))  # for a rawloop that is not installed


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
        main(placed(arguments, came, file))
    except ChildFailedError as error:
        lines, code = failed(error)
        say("\n".join(lines))
        return code
    except SignalException as error:
        return left(file, f"stopped by {error.sigval.name}") or stopped(error.sigval)
    except (RendezvousError, DistError) as error:
        return left(file, type(error).__name__) or not_met(error, arguments, came)
    except RawloopError as error:
        note(str(error))
        return error.exit_code
    return 0


def left(file: Path, what: str) -> int:
    """Return the exit code that the workers have left, and print that it stands; 0 if there is none."""
    code = int(file.read_text()) if file.exists() else 0
    if code:
        note(f"{what}; exit code {code} of the workers stands")
    return code


def say(text: str) -> None:
    """Print a line to standard error."""
    print(text, file=sys.stderr, flush=True)


# -- several machines --------------------------------------------------------------------------------------------


def option(arguments: list[str], name: str) -> str | None:
    """Return the value of `--name=value` among torchrun's own options."""
    return next((word.removeprefix(name) for word in arguments if word.startswith(name)), None)


def placed(arguments: list[str], came: list[str], file: Path) -> list[str]:
    """Add to torchrun's arguments this machine's own address, and whether it hosts the store of --rdzv-endpoint.

    Waits until the machine of the endpoint is there. Sets GLOO_SOCKET_IFNAME unless it is set. `came` is kept up to
    date with the addresses of the machines that wait for the others.
    """
    endpoint = option(arguments, ENDPOINT)
    if endpoint is None:
        return arguments
    from torch.distributed import TCPStore

    from rawloop.meeting import ask_store, find_seat, is_free, wait_for_listener

    host, _, port = endpoint.rpartition(":")
    conf = option(arguments, CONF)
    limit = seconds_to_join(conf)
    seat = find_seat(host, int(port), limit, note)
    loopback = seat.address in ("127.0.0.1", "::1")  # several of us may be here; torchrun then finds out who is first
    hosts = seat.is_host and is_free(seat.address, int(port))
    if not hosts:
        wait_for_listener(host, int(port), limit, note)
        time_limit = timedelta(seconds=limit)
        ask_store(lambda: TCPStore(host, int(port), None, False, time_limit, wait_for_workers=False), endpoint)
        refuse_if_full(arguments)
    # Else the agents share a store whose place torchrun (2.13) does not tell to a machine that comes back.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    if seat.interface and not loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", seat.interface)
    if not (loopback and hosts):
        conf = f"{conf},is_host={int(hosts)}" if conf else f"is_host={int(hosts)}"
        arguments = [f"{CONF}{conf}", *(word for word in arguments if not word.startswith(CONF))]
    threading.Thread(target=accompany, args=(arguments, came, file), daemon=True).start()
    return arguments if option(arguments, ADDRESS) else [f"{ADDRESS}{seat.address}", *arguments]


def note(line: str) -> None:
    """Print a line of ours."""
    say(f"torchrun: {line}")


def seconds_to_join(conf: str | None) -> float:
    """Return join_timeout of --rdzv-conf."""
    return float(dict(pair.split("=") for pair in (conf or "").split(",") if pair).get("join_timeout", JOIN))


def not_met(error: Exception, arguments: list[str], came: list[str]) -> int:
    """Print why the machines did not meet, or lost each other. Return the exit code."""
    from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousTimeoutError

    endpoint, name = option(arguments, ENDPOINT), option(arguments, ID)
    if endpoint is None:
        raise error
    if isinstance(error, RendezvousTimeoutError):
        seconds, nodes = seconds_to_join(option(arguments, CONF)), option(arguments, NODES)
        who = f"{len(came)} of {nodes} machines ({', '.join(came)}) came to {endpoint} in {seconds:g} s (JOIN_TIMEOUT)"
        note(f"{who}: start the same command on the others, with the same RDZV_ID={name}")
    elif isinstance(error, RendezvousClosedError):
        note(f"the run with RDZV_ID={name} has ended at {endpoint}: start all machines again, with another RDZV_ID")
    else:
        lost(endpoint, str(error.__cause__ or error).splitlines()[0])
    return 1


def refuse_if_full(arguments: list[str]) -> None:
    """Refuse to join a run that has all its machines: torchrun would wait until it ends.

    A machine that is lost stays listed for a while, without signs of life, and this one may replace it.
    """
    from rawloop.errors import UserError

    endpoint, name, nodes = (option(arguments, each) for each in (ENDPOINT, ID, NODES))
    states, first = states_of(endpoint, name), None
    for _ in range(SIGNS):
        state = next(states)
        if state is None or not state.complete or len(state.participants) < int(nodes.rpartition(":")[2]):
            return
        first = first or dict(state.last_heartbeats)
        if all(state.last_heartbeats.get(node) != first.get(node) for node in state.participants):
            here = ", ".join(sorted(node.addr for node in state.participants))
            raise UserError(f"the run with RDZV_ID={name} trains on all its machines ({here}): choose another RDZV_ID")
        time.sleep(1)


def accompany(arguments: list[str], came: list[str], file: Path) -> None:
    """Tell who is missing while machines are missing, in `came` too; end this process if all others are lost.

    For a thread: torchrun waits for the answer of a machine that is lost until the network gives up, a quarter of an
    hour later. `file` is that of the exit code.
    """
    from rawloop.meeting import ANSWER, within

    endpoint, name, nodes = (option(arguments, each) for each in (ENDPOINT, ID, NODES))
    most = f"at most {seconds_to_join(option(arguments, CONF)):g} s (JOIN_TIMEOUT)"
    told: list[str] = []
    states = states_of(endpoint, name)
    try:
        time.sleep(3)  # until the store is there
        while True:
            state = within(ANSWER, lambda: next(states))
            came[:] = sorted(node.addr for node in state.participants) if state and not state.complete else []
            if came and came != told:
                note(f"{len(came)} of {nodes} machines are here ({', '.join(came)}): waiting for the others, {most}")
            told = list(came)
            time.sleep(3)
    except Exception as error:  # of the network: whatever it is, the store is lost
        cause = str(error).splitlines()[0]
    quiet = 0
    while quiet < LOST:
        time.sleep(1)
        quiet = 0 if has_children() else quiet + 1
    code = (int(file.read_text()) if file.exists() else 0) or 1
    lost(endpoint, cause)
    shutil.rmtree(file.parent, ignore_errors=True)
    os._exit(code)


def has_children() -> bool:
    """Return whether this process has children that run. True where the system does not tell."""
    found = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            state, parent = place.read_text().rpartition(")")[2].split()[:2]
            found.append(int(parent) == os.getpid() and state != "Z")
    return any(found) or not found


def lost(endpoint: str, cause: str) -> None:
    """Print that the machine with the store is lost."""
    note(f"the machine of {endpoint} does not answer any more ({cause}); its own message says why")


def states_of(endpoint: str, name: str) -> Iterator[Any]:
    """Yield what the machines at the endpoint have noted about a run, or None, again and again."""
    from torch.distributed import TCPStore
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend

    host, _, port = endpoint.rpartition(":")
    store = TCPStore(host, int(port), None, False, timedelta(seconds=10), wait_for_workers=False)
    backend = C10dRendezvousBackend(store, name)
    while True:
        found = backend.get_state()
        yield pickle.loads(found[0]) if found else None  # noqa: S301 (ours)


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
