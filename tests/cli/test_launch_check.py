"""The check of a launch: what is equal, what differs and on which ranks, and that nothing stays behind."""

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml

from rawloop.cli.launch_check import Row, amounts, by_rank, clock_row, output_row
from rawloop.dist import World

Ranks = Callable[..., list[Any]]
NAMES = ["host", "device", "code", "settings", "model.path", "data.train", "data.eval", "data.codes"]


def rows_of(done: Any) -> list[Row]:
    return [Row(*re.split(r" {2,}", line, maxsplit=2)) for line in done.out.splitlines()]


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def test_one_process(door: Callable[..., Any], config: Path, tmp_path: Path) -> None:
    before = files(tmp_path)
    done = door("launch-check", config)
    assert (done.code, done.err) == (0, "")
    rows = rows_of(done)
    assert [row.name for row in rows[:8]] == NAMES
    assert {row.result for row in rows} == {"equal", "measured"}
    assert files(tmp_path) == before


def test_two_ranks_that_are_equal(ranks: Ranks, config: Path, tmp_path: Path) -> None:
    before = files(tmp_path)
    first, second = ranks("launch-check", config)
    assert (first.code, second.code, second.out) == (0, 0, ""), first.err
    rows = {row.name: row for row in rows_of(first)}
    assert rows["output"].found == f"{tmp_path}/run is shared and writable"
    assert rows["clocks"].result == "measured"
    assert re.fullmatch(r"a sum over 2 ranks takes \S+ ms", rows["gloo"].found)
    assert files(tmp_path) == before


def test_two_ranks_that_differ(ranks: Ranks, config: Path, tmp_path: Path) -> None:
    """Settings, the contents of a path, and a path that one machine lacks."""
    settings = yaml.safe_load(config.read_text())
    other = ["--optim.lr", "0.5", "--data.eval", settings["data"]["train"], "--model.path", f"{tmp_path}/none"]
    first, second = ranks("launch-check", config, last=other)
    assert (first.code, second.code) == (2, 2)
    wrong = [row for row in rows_of(first) if row.result != "equal" and row.result != "measured"]
    assert wrong[0] == Row("DIFFERS", "optim.lr", "0.003 (rank 0), 0.5 (rank 1)")
    assert [row[:2] for row in wrong[1:]] == [("DIFFERS", "model.path"), ("DIFFERS", "data.eval")]
    assert wrong[1].found.endswith(
        f"digest {wrong[1].found.split()[3]} (rank 0), {tmp_path}/none is not a folder (rank 1)"
    )
    assert re.fullmatch(
        r"metadata.json, \S+ bytes, digest \S+ \(rank 0\), metadata.json, .* \(rank 1\)", wrong[2].found
    )
    assert first.err.splitlines()[-1] == (
        "rawloop launch-check: 3 of 13 checks failed: optim.lr, model.path, data.eval: start every process with the "
        "same command, and the same data, model and code"
    )
    assert (second.out, second.err) == ("", "")


def test_what_no_rank_has_fails_too(door: Callable[..., Any], config: Path, tmp_path: Path) -> None:
    done = door("launch-check", config, "--data.train", tmp_path / "none", "--seconds", "5")
    assert done.code == 2
    (row,) = [row for row in rows_of(done) if row.result == "FAILED"]
    assert row.name == "data.train"
    assert row.found.startswith(f"{tmp_path}/none does not exist")


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "1e7"])
def test_a_wrong_number_of_seconds(refusal: Callable[..., str], config: Path, seconds: str) -> None:
    assert "seconds" in refusal("launch-check", config, "--seconds", seconds)


def examine_folders(world: World, folders: Sequence[str]) -> Row:
    return output_row(folders[world.rank], world)


def test_folders_that_are_not_shared(run_ranks: Ranks, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    rows = run_ranks(examine_folders, [f"{tmp_path}/a/run", f"{tmp_path}/b/run"])
    why = f"{tmp_path}/b is not the folder of rank 0: a run needs a file system that all machines share (rank 1)"
    assert rows == [Row("FAILED", "output", why)] * 2
    assert [*files(tmp_path / "a"), *files(tmp_path / "b")] == []


def test_a_folder_that_cannot_be_written(permissions_count: None, tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    row = output_row(f"{tmp_path}/run", World())
    tmp_path.chmod(0o755)
    why = f"nothing can be written into {tmp_path}: Permission denied (rank 0)"
    assert row == Row("FAILED", "output", why)


def late(world: World) -> Row:
    real = time.time
    with patch("time.time", lambda: real() + (60 if world.rank == 1 else 0)):
        return clock_row(world)


def test_clocks_that_are_apart(run_ranks: Ranks) -> None:
    for row in run_ranks(late):
        assert row[:2] == ("FAILED", "clocks")
        found = re.fullmatch(
            r"(\S+) s apart \(the earliest is rank 0's, the latest rank 1's\): set them by NTP", row.found
        )
        assert found
        assert 30 < float(found[1]) < 90


def test_values_are_told_with_their_ranks() -> None:
    assert by_rank(["a", "a"]) == "a"
    assert by_rank(["a", "b", "a", "a", "a", "b"]) == "a (ranks 0, 2-4), b (ranks 1, 5)"
    assert by_rank(["a", "b"]) == "a (rank 0), b (rank 1)"
    assert amounts("free", [2_000_000_000, 1_000_000_000]).found == "1.0 GB (rank 1) to 2.0 GB"
    assert amounts("free", [2_000_000_000, 2_000_000_001]).found == "2.0 GB"
