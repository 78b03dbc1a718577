"""Meetings of ranks in a store that is real and may be old; addresses at which nothing, or something else, listens."""

import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from rawloop.errors import LostRank, RawloopError
from rawloop.meeting import Meeting, Seat, ask_store, find_seat, interface_of, is_free, wait_for_listener

LIMIT = timedelta(seconds=60)


@pytest.fixture
def clients() -> Iterator[Callable[[], Any]]:
    """Give a function that connects to one store, as each process does."""
    server = TCPStore("127.0.0.1", 0, None, True, LIMIT, wait_for_workers=False)
    yield partial(TCPStore, "127.0.0.1", server.port, None, False, LIMIT, wait_for_workers=False)
    del server  # which ends with its last reference


def meet(clients: Callable[[], Any], size: int, ranks: dict[int, int], seconds: float = 60.0) -> list[Any]:
    """Let these ranks meet, each in a thread, with its count of restarts. Returns what each got or raised."""

    def go(rank: int, restarts: int) -> Any:
        try:
            return Meeting(clients(), rank, size, seconds).meet(restarts)
        except RawloopError as error:
            return error

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(go, ranks, ranks.values()))


def test_all_get_one_name_and_one_count_of_restarts(clients: Callable[[], Any]) -> None:
    first = meet(clients, 3, {0: 0, 1: 2, 2: 0})
    assert first == [first[0]] * 3
    assert first[0][1] == 2
    second = meet(clients, 3, {0: 0, 1: 0, 2: 0})
    assert second == [second[0]] * 3
    assert second[0][1] == 0
    assert second[0][0] != first[0][0]


def test_notes_of_dead_processes_change_nothing(clients: Callable[[], Any]) -> None:
    """What processes have left that were killed at any point of their meeting, on machines that count differently."""
    store = clients()
    store.set("hello-1", '"dead"')
    store.set("answer-dead", '"old"')
    store.set("old/here-1", "0")
    store.set("old/all", '{"missing": [], "restarts": 7}')
    found = meet(clients, 2, {0: 0, 1: 2})
    assert found == [found[0]] * 2
    assert found[0][1] == 2
    assert found[0][0] != "old"
    PrefixStore(found[0][0], store).set("0", "a key of this start")
    assert not PrefixStore("old", store).check(["0"])


def test_ranks_that_do_not_come_are_named_by_all_that_are_here(clients: Callable[[], Any]) -> None:
    start = time.monotonic()
    errors = meet(clients, 4, {0: 0, 2: 0}, seconds=1.0)
    assert time.monotonic() - start < 30
    line = "ranks 1, 3 of 4 did not come within 1 s (ddp.timeout): look whether that process was started and what it"
    assert all(isinstance(error, LostRank) and str(error).startswith(line) for error in errors)
    assert [error.is_reporter for error in errors] == [True, False]


def test_rank_0_is_missed_too(clients: Callable[[], Any]) -> None:
    errors = meet(clients, 3, {1: 0, 2: 0}, seconds=0.5)
    assert [str(error).partition(" did")[0] for error in errors] == ["rank 0 of 3"] * 2
    assert [error.is_reporter for error in errors] == [True, False]


def test_a_listener_that_comes_late_is_waited_for(free_socket: socket.socket) -> None:
    said: list[str] = []
    timer = threading.Timer(0.3, free_socket.listen)
    timer.start()
    wait_for_listener("127.0.0.1", free_socket.getsockname()[1], 60, said.append)
    timer.join()
    assert said == []


@pytest.fixture
def free_socket() -> Iterator[socket.socket]:
    """A port of this test, at which nothing listens yet."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held


def test_an_address_without_a_listener(free_socket: socket.socket) -> None:
    port = free_socket.getsockname()[1]
    with pytest.raises(RawloopError) as told:
        wait_for_listener("127.0.0.1", port, 0.2)
    line = f"127.0.0.1:{port} cannot be reached: nothing answers there (Connection refused); tried for 0.2 s"
    assert str(told.value) == line
    with pytest.raises(RawloopError, match=r"^no\.such:1 cannot .*: no host has the name 'no\.such' here"):
        wait_for_listener("no.such", 1, 0.2)


def test_a_listener_that_is_no_store(free_socket: socket.socket) -> None:
    free_socket.listen()
    port = free_socket.getsockname()[1]
    connect = partial(TCPStore, "127.0.0.1", port, None, False, LIMIT, wait_for_workers=False)
    with pytest.raises(RawloopError) as told:
        ask_store(connect, f"127.0.0.1:{port}", 1.0)
    assert str(told.value).startswith(f"another program listens at 127.0.0.1:{port}, and not torch's store")


def test_a_store_answers_and_its_errors_are_passed_on(clients: Callable[[], Any]) -> None:
    ask_store(clients, "it").set("a", "b")
    with pytest.raises(ZeroDivisionError):
        ask_store(lambda: 1 / 0, "it")


def test_the_seat_of_this_machine(free_socket: socket.socket) -> None:
    port = free_socket.getsockname()[1]
    loopback = "lo" if sys.platform == "linux" else None
    assert find_seat("localhost", port, 60) == Seat("127.0.0.1", loopback, is_host=True)
    assert interface_of("192.0.2.1") is None  # an address for documentation, which nobody has
    with pytest.raises(RawloopError, match=r"no\.such:1 cannot be reached: no host has the name 'no\.such' here"):
        find_seat("no.such", 1, 0.2)
    free_socket.listen()
    assert not is_free("127.0.0.1", port)
    free_socket.close()
    assert is_free("127.0.0.1", port)
