"""Capsules on the disk: their names, their number by rank, and a write that fails."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rawloop.watch.capsule import Capsule, Capsules, read_facts
from rawloop.watch.config import WatchConfig


def capsule() -> Capsule:
    return Capsule({"kind": "run", "step": 7})


def test_each_rank_counts_its_own(tmp_path: Path) -> None:
    one, eleven = (Capsules(tmp_path, WatchConfig(capsules=2), rank) for rank in (1, 11))
    for _ in range(2):
        eleven.write(7, capsule)
    assert not eleven.has_room()
    assert one.has_room()
    assert one.write(7, capsule) == (tmp_path / "capsules" / "step-00000007-rank1", "")
    assert one.write(7, capsule) == (tmp_path / "capsules" / "step-00000007-rank1-2", "")
    assert not one.has_room()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"states": {"passes": {"a": object()}}}, "made: TypeError"),
        ({"texts": {"gone/a": "x"}}, "written: "),
    ],
)
def test_a_write_that_fails_leaves_nothing_and_says_why(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    capsules = Capsules(tmp_path, WatchConfig(), 0)
    path, problem = capsules.write(7, lambda: replace(capsule(), **change))
    assert path is None
    assert problem.startswith(f"a capsule could not be {reason}")
    assert list(tmp_path.rglob("*")) in ([], [tmp_path / "capsules"])
    path, _ = capsules.write(7, capsule)
    assert path is not None
    assert read_facts(path)["step"] == 7
