"""Mistakes in starting several processes: what a user reads, and that no process waits for longer than it must."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

Refusal = Callable[..., str]
Variables = dict[str, str]
HERE = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
ALL_FOUR = (
    "start the processes with torchrun, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT (and LOCAL_RANK) for each"
)


@pytest.mark.parametrize("command", ["prepare", "train"])
@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"WORLD_SIZE": "2"}, f"WORLD_SIZE is 2 and RANK is not set: {ALL_FOUR}"),
        ({"RANK": "1"}, f"RANK is 1 and WORLD_SIZE is not set: ranks count from 0 to WORLD_SIZE - 1; {ALL_FOUR}"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 and WORLD_SIZE is 2: ranks count from 0 to WORLD_SIZE - 1; "),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is -1 and WORLD_SIZE is 2: ranks count from 0 to WORLD_SIZE - 1; "),
        (HERE | {"LOCAL_RANK": "-1"}, "LOCAL_RANK is -1: it counts the processes of a machine from 0"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, f"RANK is 0, WORLD_SIZE is 2 and MASTER_ADDR is not set: {ALL_FOUR}"),
        (HERE, f"RANK is 0, WORLD_SIZE is 2 and MASTER_PORT is not set: {ALL_FOUR}"),
        (HERE | {"MASTER_PORT": "x"}, "MASTER_PORT is 'x': it must be a number from 1 to 65535"),
        (HERE | {"MASTER_PORT": "70000"}, "MASTER_PORT is '70000': it must be a number from 1 to 65535"),
    ],
)
def test_the_launchers_variables(
    refusal: Refusal,
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    environment: dict[str, str],
    line: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert refusal(command, "--config", config).startswith(line)


@pytest.mark.parametrize(
    ("rank", "address", "line"),
    [
        ("1", "no.such", "rank 1 cannot meet the others: no.such:{port} cannot be reached: no host has the name 'no.s"),
        ("1", "127.0.0.1", "rank 1 cannot meet the others: 127.0.0.1:{port} cannot be reached: nothing answers there"),
        ("0", "127.0.0.1", "rank 0 cannot meet the others at 127.0.0.1:{port}: another program of this machine has th"),
    ],
    ids=["unknown host", "nobody there", "taken port"],
)
def test_a_place_where_ranks_cannot_meet(
    refusal: Refusal, config: Path, monkeypatch: pytest.MonkeyPatch, rank: str, address: str, line: str
) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        if rank == "0":
            held.listen()
        for name, value in (HERE | {"RANK": rank, "MASTER_ADDR": address, "MASTER_PORT": str(port)}).items():
            monkeypatch.setenv(name, value)
        start = time.monotonic()
        said = refusal("train", "--config", config, "--ddp.timeout", "1", code=1)
    assert said.startswith(line.format(port=port))
    assert time.monotonic() - start < 60


def test_a_rank_that_never_comes_is_named(ranks: Callable[..., list[Any]], config: Path) -> None:
    then = partial(kill, 2)  # as where a machine has no room for it
    first, second, _ = ranks("train", "--config", config, "--ddp.timeout", "3", size=3, then=then)
    line = "rawloop train: rank 2 of 3 did not come within 3 s (ddp.timeout): look whether that process was started"
    assert first.err.startswith(line), first.err
    assert second.err == ""
    assert (first.code, second.code) == (1, 1)


def kill(rank: int, processes: list[int]) -> None:
    os.kill(processes[rank], signal.SIGKILL)


def test_a_command_of_its_own_process_is_imported_without_collecting_garbage() -> None:
    script = (
        "import gc, rawloop.cli as cli\n"
        "for own in (False, True): cli.imported('train', own); print(gc.isenabled(), gc.get_freeze_count() > 100_000)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout == "True False\nTrue True\n"
