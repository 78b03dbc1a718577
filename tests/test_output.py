"""What ranks print: rank 0 to the console, the others into files of the run, attempt after attempt."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rawloop.dist import World
from rawloop.errors import UserError
from rawloop.output import RankLog

# Each case in a process of its own, forked after the imports: `rank how` -> what its console shows.
SCRIPT = """
import os, sys
from pathlib import Path
from rawloop.dist import World
from rawloop.errors import UserError
from rawloop.output import rank_log

folder, console = map(Path, sys.argv[1:3])

def go(rank, how):
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

for case in sys.argv[3:]:
    rank, how = case.split("-")
    child = os.fork()
    if not child:
        for stream in (1, 2):
            os.dup2(os.open(console / f"{case}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
        go(int(rank), how)
        sys.exit()
    os.waitpid(child, 0)
"""


def run(tmp_path: Path, *cases: str) -> tuple[Path, list[list[str]]]:
    """Run cases one after the other. Returns the run folder, and the lines on the console of each case."""
    folder, console = tmp_path / "run", tmp_path / "console"
    folder.mkdir()
    console.mkdir()
    subprocess.run([sys.executable, "-c", SCRIPT, folder, console, *cases], check=True)
    return folder, [(console / case).read_text().splitlines() for case in cases]


def test_other_ranks_write_into_files_of_the_run(tmp_path: Path) -> None:
    folder, (main, starts, mistake, bug) = run(tmp_path, "0-runs", "1-starts", "1-mistake", "1-bug")
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


def test_a_command_that_was_refused_leaves_no_file(tmp_path: Path) -> None:
    folder, _ = run(tmp_path, "1-mistake", "2-mistake")
    assert list(folder.iterdir()) == []
    folder.rmdir()
    (tmp_path / "console").rename(tmp_path / "before")
    folder, _ = run(tmp_path, "1-bug", "1-mistake", "2-mistake")
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
