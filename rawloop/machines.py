"""How the machines of a launch find and lose each other, for launch/torchrun.py, which starts torchrun on each of them.

torchrun guesses from host names which machine hosts the store, and gloo which interface leads to the others. Both are
wrong on many clusters. So they are found out here, from the address of --rdzv-endpoint. No torch is imported before
a function is called: the launcher blocks a signal first.
"""

import os
import pickle
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from rawloop.errors import UserError
from rawloop.meeting import ANSWER, ask_store, find_seat, is_free, wait_for_listener, within

SIGNS = 20  # seconds in which a machine that lives gives a sign; torchrun's interval is 5
LOST = 60  # seconds without the store and without processes, after which torchrun is ended
JOIN = 600.0  # torchrun's own join_timeout, in seconds
ENDPOINT, CONF, ID, NODES = "--rdzv-endpoint=", "--rdzv-conf=", "--rdzv-id=", "--nnodes="
ADDRESS = "--local-addr="


def say(text: str) -> None:
    """Print a line to standard error."""
    print(text, file=sys.stderr, flush=True)


def option(arguments: list[str], name: str) -> str:
    """Return the value of `--name=value` among torchrun's own options, or an empty string."""
    return next((word.removeprefix(name) for word in arguments if word.startswith(name)), "")


def placed(arguments: list[str], came: list[str], file: Path) -> list[str]:
    """Add to torchrun's arguments this machine's own address, and whether it hosts the store of --rdzv-endpoint.

    Waits until the machine of the endpoint is there. Sets GLOO_SOCKET_IFNAME unless it is set. `came` is kept up to
    date with the addresses of the machines that wait for the others.
    """
    endpoint = option(arguments, ENDPOINT)
    if not endpoint:
        return arguments
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

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
    threading.Thread(target=accompany, args=(arguments, came, file, hosts), daemon=True).start()
    return arguments if option(arguments, ADDRESS) else [f"{ADDRESS}{seat.address}", *arguments]


def note(line: str) -> None:
    """Print a line of ours."""
    say(f"torchrun: {line}")


def seconds_to_join(conf: str) -> float:
    """Return join_timeout of --rdzv-conf."""
    return float(dict(pair.split("=") for pair in conf.split(",") if pair).get("join_timeout", JOIN))


def not_met(error: Exception, arguments: list[str], came: list[str]) -> int:
    """Print why the machines did not meet, or lost each other. Return the exit code."""
    from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousTimeoutError

    endpoint, name = option(arguments, ENDPOINT), option(arguments, ID)
    if not endpoint:
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


def accompany(arguments: list[str], came: list[str], file: Path, hosts: bool) -> None:
    """Tell who is missing while machines are missing, in `came` too; end this process if the store is lost.

    For a thread: torchrun waits for the answer of a machine that is lost until the network gives up, a quarter of an
    hour later. `file` is that of the exit code. A machine that `hosts` the store loses it only when it ends itself.
    """
    endpoint, name, nodes = (option(arguments, each) for each in (ENDPOINT, ID, NODES))
    most = f"at most {seconds_to_join(option(arguments, CONF)):g} s (JOIN_TIMEOUT)"
    told: list[str] = []
    states = states_of(endpoint, name)
    try:
        time.sleep(3)  # until the store is there
        while True:
            state = within(2 * ANSWER, lambda: next(states))  # more than the store's own limit
            came[:] = sorted(node.addr for node in state.participants) if state and not state.complete else []
            if came and came != told:
                note(f"{len(came)} of {nodes} machines are here ({', '.join(came)}): waiting for the others, {most}")
            told = list(came)
            time.sleep(3)
    except Exception as error:  # of the network: whatever it is, the store is lost
        cause = str(error).splitlines()[0]
    if hosts:
        return
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
    from torch.distributed import TCPStore  # type: ignore[attr-defined]
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend

    host, _, port = endpoint.rpartition(":")
    store = TCPStore(host, int(port), None, False, timedelta(seconds=ANSWER), wait_for_workers=False)
    backend = C10dRendezvousBackend(store, name)
    while True:
        found = backend.get_state()
        yield pickle.loads(found[0]) if found else None  # noqa: S301 (ours)
