"""How the ranks of one start meet: they find the store, agree on a name for this start, and miss who does not come.

The store may be older than this start. torchrun keeps it when it starts the processes again, with the notes of dead
processes in it, and each machine has its own count of restarts. So every process writes a fresh id, and rank 0 answers
with the name of the start, under which the ranks then write.
"""

import fcntl
import json
import socket
import struct
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from threading import Thread
from typing import Any, NamedTuple, TypeVar

from rawloop.errors import LostRank, RawloopError, first_few

UNKNOWN = 60.0  # seconds after which the name of a host counts as wrong; a cluster may make it while it starts
ANSWER = 30.0  # seconds in which a store answers
SIOCGIFADDR = 0x8915  # of Linux: the address of an interface
T = TypeVar("T")


def wait_for_listener(host: str, port: int, seconds: float, say: Callable[[str], None] = lambda line: None) -> None:
    """Wait until something listens at an address. `say` gets a line if that takes long.

    Raises:
        RawloopError: nothing does.
    """
    _insist(lambda: socket.create_connection((host, port), timeout=5).close(), host, port, seconds, say)


def _insist(attempt: Callable[[], T], host: str, port: int, seconds: float, say: Callable[[str], None]) -> T:
    """Repeat an attempt to reach an address until it succeeds."""
    start, said = time.monotonic(), False
    while True:
        try:
            return attempt()
        except socket.gaierror as error:
            why, limit = f"no host has the name '{host}' here ({error.strerror})", min(UNKNOWN, seconds)
        except OSError as error:
            why, limit = f"nothing answers there ({error.strerror or error})", seconds
        waited = time.monotonic() - start
        if waited >= limit:
            raise RawloopError(f"{host}:{port} cannot be reached: {why}; tried for {limit:g} s")
        if waited > 5 and not said:
            said = True
            say(f"waiting for {host}:{port}, at most {limit:g} s: {why}")
        time.sleep(min(0.5, max(0.05, limit - waited)))


class Seat(NamedTuple):
    """How this machine is seen from a host: the address and the interface that lead there, and whether it is the host.

    `interface` is None if it is unknown.
    """

    address: str
    interface: str | None
    is_host: bool


def find_seat(host: str, port: int, seconds: float, say: Callable[[str], None] = lambda line: None) -> Seat:
    """Find out how this machine is seen from a host. Nothing is sent. Waits like `wait_for_listener` for its name.

    Raises:
        RawloopError: the name is unknown, or no network leads there.
    """
    return _insist(lambda: _seat(host, port), host, port, seconds, say)


def _seat(host: str, port: int) -> Seat:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    for family, kind, _, _, place in found:
        with socket.socket(family, kind) as probe, suppress(OSError):
            probe.bind((place[0], 0))  # works for an address of this machine only
            return Seat(str(place[0]), interface_of(str(place[0])), is_host=True)
    family, kind, _, _, place = found[0]
    with socket.socket(family, kind) as probe:
        probe.connect(place)
        address = probe.getsockname()[0]
    return Seat(address, interface_of(address), is_host=False)


def is_free(address: str, port: int) -> bool:
    """Return whether no program of this machine listens at a port."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True


def interface_of(address: str) -> str | None:
    """Return the name of the network interface that has an IPv4 address; None if that is unknown."""
    if sys.platform != "linux":
        return None
    return next((name for _, name in socket.if_nameindex() if _address_of(name) == address), None)


def _address_of(interface: str) -> str | None:
    request = struct.pack("256s", interface.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):  # it may have no address
        return socket.inet_ntoa(fcntl.ioctl(probe, SIOCGIFADDR, request)[20:24])
    return None


def within(seconds: float, attempt: Callable[[], T]) -> T:
    """Return what `attempt` returns, which may never end: it runs in a thread that is left alone after that time.

    Raises:
        TimeoutError: it took longer.
        Exception: what it raises.
    """
    made: list[T] = []
    failed: list[Exception] = []

    def run() -> None:
        try:
            made.append(attempt())
        except Exception as error:
            failed.append(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not made:
        raise TimeoutError(f"it took longer than {seconds:g} s")
    return made[0]


def ask_store(connect: Callable[[], T], place: str, seconds: float = ANSWER) -> T:
    """Return what `connect` returns, which connects to a store; torch waits for its answer without limit.

    Raises:
        RawloopError: what listens there is not a store.
    """
    try:
        return within(seconds, connect)
    except TimeoutError as error:
        what = f"another program listens at {place}, and not torch's store"
        raise RawloopError(f"{what}: choose another port") from error


class Meeting:
    """The ranks of one start, in a store of torch.distributed. All ranks call `meet` once.

    Args:
        store: shared by the ranks.
        rank: of this process.
        size: number of ranks.
        seconds: how long rank 0 waits for the others, and they for it.
    """

    def __init__(self, store: Any, rank: int, size: int, seconds: float) -> None:
        self.store, self.rank, self.size, self.seconds = store, rank, size, seconds
        self.id = uuid.uuid4().hex

    def meet(self, restarts: int) -> tuple[str, int]:
        """Wait until all ranks are here.

        Args:
            restarts: how often the launcher has restarted the processes of this machine.

        Returns:
            a prefix for the keys of this start, and how often the ranks have been restarted, the same on all ranks.

        Raises:
            LostRank: a rank did not come in time; the message names it.
        """
        return self._lead(restarts) if self.rank == 0 else self._follow(restarts)

    def _lead(self, restarts: int) -> tuple[str, int]:
        counts, missing = [restarts], list(range(1, self.size))
        deadline = time.monotonic() + self.seconds
        answered: dict[int, str] = {}
        while missing and time.monotonic() < deadline:
            for rank in list(missing):
                if (count := self._read(f"{self.id}/here-{rank}")) is not None:
                    counts.append(count)
                    missing.remove(rank)
                elif (name := self._read(f"hello-{rank}")) is not None and answered.get(rank) != name:
                    answered[rank] = name
                    self._write(f"answer-{name}", self.id)
            time.sleep(0.02)
        self._write(f"{self.id}/all", {"missing": missing, "restarts": max(counts)})
        if missing:
            time.sleep(1)  # until the others have read it: this process may host the store
        return self._begin(missing, max(counts), self.id)

    def _follow(self, restarts: int) -> tuple[str, int]:
        self._write(f"hello-{self.rank}", self.id)
        start = self._wait_for(f"answer-{self.id}", self.seconds)
        if start is not None:
            self._write(f"{start}/here-{self.rank}", restarts)
            told = self._wait_for(f"{start}/all", self.seconds + ANSWER)
            if told is not None:
                return self._begin(told["missing"], told["restarts"], start)
        return self._begin([0], restarts, "")

    def _begin(self, missing: list[int], restarts: int, start: str) -> tuple[str, int]:
        if not missing:
            return start, restarts
        names = f"rank{'s' if len(missing) > 1 else ''} {first_few(missing)}"
        error = LostRank(
            f"{names} of {self.size} did not come within {self.seconds:g} s (ddp.timeout): look whether that process "
            "was started and what it printed"
        )
        error.is_reporter = self.rank == min(set(range(self.size)) - set(missing))
        raise error

    def _write(self, key: str, value: Any) -> None:
        self.store.set(key, json.dumps(value))

    def _read(self, key: str) -> Any:
        return json.loads(self.store.get(key)) if self.store.check([key]) else None

    def _wait_for(self, key: str, seconds: float) -> Any:
        deadline = time.monotonic() + seconds
        while (value := self._read(key)) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        return value
