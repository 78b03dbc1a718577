"""What ranks print: rank 0 to the console, the others into files of the run, attempt after attempt."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from rawloop.dist import World
from rawloop.errors import UserError
from rawloop.output import RankLog
from tests.forks import Forks

SCRIPT = """
import os, sys
from pathlib import Path
from rawloop.dist import World
from rawloop.errors import UserError
from rawloop.output import rank_log

folder, rank, how = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
os.dup2(1, 2)
with rank_log(World(rank=rank, size=2)) as log:
    print("before")
    log.open(folder)
    print("inside", flush=True)
    os.system("echo of a child")
    if how == "starts":
        (folder / "events.jsonl").touch()
    if how == "mistake":
        raise UserError("a mistake")
    if how == "bug":
        raise KeyError("a bug")
print("after", flush=True)
"""


def run(forks: Forks, folder: Path, *cases: str) -> list[list[str]]:
    """Run cases (`rank-how`) into a run folder, one after the other. Returns the lines on the console of each."""
    folder.mkdir(exist_ok=True)
    return [forks.run("-c", SCRIPT, folder, *case.split("-"), finalize=True).stdout.splitlines() for case in cases]


def test_other_ranks_write_into_files_of_the_run(forks: Forks, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    main, starts, mistake, bug = run(forks, folder, "0-runs", "1-starts", "1-mistake", "1-bug")
    assert main == ["before", "inside", "of a child", "after"]
    assert starts == ["before", "after"]
    assert (mistake[0], mistake[-1]) == ("before", "rawloop.errors.UserError: a mistake")  # the console is back
    assert (bug[0], bug[-1]) == ("before", "KeyError: 'a bug'")
    assert [file.name for file in folder.glob("logs/*")] == ["rank-1.txt"]
    attempts = (folder / "logs" / "rank-1.txt").read_text().split("--- rank 1 on ")[1:]
    first, second, third = (attempt.splitlines()[1:] for attempt in attempts)
    assert first == ["inside", "of a child"]
    assert second == ["inside", "of a child", "UserError: a mistake"]
    assert third[:3] == ["inside", "of a child", "Traceback (most recent call last):"]
    assert third[-1] == "KeyError: 'a bug'"


def test_a_command_that_was_refused_leaves_no_file(forks: Forks, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(forks, folder, "1-mistake", "2-mistake")
    assert list(folder.iterdir()) == []
    run(forks, folder, "1-bug", "1-mistake", "2-mistake")
    assert [file.name for file in folder.glob("logs/*")] == ["rank-1.txt"]
    assert "a bug" in (folder / "logs" / "rank-1.txt").read_text()


@pytest.fixture
def closed(tmp_path: Path, permissions_count: None) -> Iterator[Path]:
    """A folder into which nothing can be written."""
    folder = tmp_path / "run"
    folder.mkdir()
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)


def test_a_folder_that_a_machine_cannot_write_into(closed: Path) -> None:
    host = os.uname().nodename
    with pytest.raises(UserError) as told:
        RankLog(World(rank=1, size=2)).open(closed)
    line = f"output is '{closed}', and {host} cannot write into it: Permission denied ({closed}/logs); all machines of"
    assert str(told.value).startswith(line)
    RankLog(World(rank=0, size=2)).open(closed)  # rank 0 has found out before


def test_a_folder_that_a_machine_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"which .* does not have: the machines of a run need a shared file system"):
        RankLog(World(rank=1, size=2)).open(tmp_path / "run")
