"""Capsules on the disk: their names, their number by rank, and a write that fails."""

from pathlib import Path

import pytest

from rawloop.watch.capsule import Capsule, Capsules, read_facts
from rawloop.watch.config import WatchConfig


def capsule() -> Capsule:
    return Capsule({"kind": "run", "step": 7})


def test_each_rank_counts_its_own(tmp_path: Path) -> None:
    one, eleven = (Capsules(tmp_path, WatchConfig(capsules=2), rank) for rank in (1, 11))
    for _ in range(2):
        eleven.write(7, capsule())
    assert not eleven.has_room()
    assert one.has_room()
    assert one.write(7, capsule()).name == "step-00000007-rank1"
    assert one.write(7, capsule()).name == "step-00000007-rank1-2"
    assert not one.has_room()


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    capsules = Capsules(tmp_path, WatchConfig(), 0)
    broken = capsule()
    broken.states = {"passes": {"a": object()}}
    with pytest.raises(TypeError):
        capsules.write(7, broken)
    broken.states, broken.texts = {}, {"gone/config.yaml": "x"}
    with pytest.raises(OSError):
        capsules.write(7, broken)
    assert list(tmp_path.rglob("*")) in ([], [tmp_path / "capsules"])
    assert read_facts(capsules.write(7, capsule()))["step"] == 7
