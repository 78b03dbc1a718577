"""Killed, or refused by the disk, at any moment of a save: all finished checkpoints are there, and the newest loads."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.forks import Forks

KILLING = Path(__file__).parent / "killing.py"


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: a kill leaves the same behind there, and no round waits for a disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as name:
        yield Path(name)


def kill(forks: Forks, folder: Path, *arguments: str, timeout: float = 110.0) -> dict[str, Any]:
    done = forks.run(KILLING, folder, *arguments, timeout=timeout, check=True)
    print(arguments, done.stdout)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("when", [pytest.param("now", marks=pytest.mark.slow), "later"])
def test_killed_before_every_file_operation_of_a_save(forks: Forks, folder: Path, when: str) -> None:
    counted = kill(forks, folder, when, "everywhere")
    assert counted["operations"] > 70
    assert counted["pair 3"] + counted["pair 4"] == counted["operations"]
    assert (
        counted["pair 4"] > 25
    )  # pointing best to it, the rotation, the events and the next save come after the commit


@pytest.mark.parametrize("when", [pytest.param("now", marks=pytest.mark.slow), "later"])
def test_a_full_disk_from_every_file_operation_on(forks: Forks, folder: Path, when: str) -> None:
    assert kill(forks, folder, when, "full")["operations"] > 25


@pytest.mark.slow
@pytest.mark.parametrize("when", ["now", "later"])
def test_killed_at_random_moments(forks: Forks, folder: Path, when: str) -> None:
    assert kill(forks, folder, when, "random", "10", "0")["kills"] == 10


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("when", ["now", "later"])
def test_killed_at_many_random_moments_on_a_real_disk(forks: Forks, tmp_path: Path, when: str) -> None:
    counted = kill(forks, tmp_path, when, "random", "200", "1", timeout=280.0)
    assert (counted["kills"], counted["aimed"]) == (200, 100)
    assert counted["aimed, in a save"] > 50
