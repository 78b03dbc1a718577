"""The manager on two processes: one state per rank, one decision for all, and nobody left waiting."""

import hashlib
import os
import random
import re
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rawloop.checkpoint.config import CheckpointConfig
from rawloop.checkpoint.manager import CheckpointManager
from rawloop.checkpoint.reader import choose
from rawloop.checkpoint.run_folder import claim_run_folder
from rawloop.checkpoint.slots import find_slots
from rawloop.contracts import FolderState, Stateful
from rawloop.dist import World
from rawloop.errors import RawloopError, UserError
from rawloop.records import Records, RecordsConfig, read_events
from rawloop.seed import RngState, seed_all

RunRanks = Callable[..., list[Any]]


class Counter:
    """A part that has no state to give, if asked so."""

    def __init__(self, value: int) -> None:
        self.value = value
        self.fails = False

    def state_dict(self) -> dict[str, Any]:
        if self.fails:
            raise RawloopError("the counter has no state")
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


class Ranks:
    """One rank's side of a run."""

    def __init__(self, world: World, run: Path) -> None:
        self.world = world
        self.run = run

    @contextmanager
    def manager(self, counter: Counter) -> Iterator[CheckpointManager]:
        parts: dict[str, Stateful | FolderState] = {"counter": counter, "rng": RngState(0, self.world.rank)}
        with Records(self.run, self.world, RecordsConfig()) as records:
            yield CheckpointManager(
                self.run, CheckpointConfig(keep_last=0, asynchronous=False, max_failures=1), self.world, records, parts
            )

    def save(self, step: int, fails: bool = False) -> str:
        """Save, and return what went wrong."""
        counter = Counter(7 + self.world.rank)
        with self.manager(counter) as manager:
            counter.fails = fails
            try:
                manager.save(step)
            except RawloopError as error:
                return str(error)
        return ""

    def load(self, which: str | Path = "latest") -> tuple[int, int, tuple[float, float]]:
        """Return the step, the counter and what the random streams give next."""
        counter = Counter(0)
        with self.manager(counter) as manager:
            step = manager.load(which).step
        return step, counter.value, draw()


def draw() -> tuple[float, float]:
    return torch.rand(1).item(), random.random()


def full_disk_on_rank_0(rank: Ranks) -> str:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank.world.is_main:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        return rank.save(4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def saving(world: World, run: Path) -> dict[str, Any]:
    rank = Ranks(world, run)
    claim_run_folder(run, world, resume=False)
    seed_all(0, world.rank)
    rank.save(1)
    rank.save(2)
    drawn = draw()
    begun = time.monotonic()
    errors = [rank.save(3, fails=world.rank == failing) for failing in (0, 1)]
    errors.append(full_disk_on_rank_0(rank))
    seconds = time.monotonic() - begun
    try:
        claim_run_folder(run, world, resume=False)
    except RawloopError as error:
        errors.append(str(error))
    return {"drawn": drawn, "errors": errors, "seconds": seconds, "loaded": rank.load()}


def test_saving_on_two_ranks(tmp_path: Path, run_ranks: RunRanks) -> None:
    run = tmp_path / "run"
    first, second = run_ranks(saving, run)
    assert first["drawn"] != second["drawn"]
    assert (first["loaded"], second["loaded"]) == ((2, 7, first["drawn"]), (2, 7, second["drawn"]))
    for outcome in (first, second):
        zero, one, full, claimed = outcome["errors"]
        assert zero == "the counter has no state"
        assert one.removeprefix("rank 1: ") == "the counter has no state"
        assert "larger than this process may write" in full
        assert "Still there: step-00000002, step-00000001; continue from it" in full
        assert "already holds a run" in claimed
        assert outcome["seconds"] < 20  # no rank waited for a collective to time out
    assert [slot.name for slot in find_slots(run)] == ["step-00000002", "step-00000001"]
    # a smaller world goes on with rank 0's stream
    assert Ranks(World(), run).load() == (2, 7, first["drawn"])


def loading(world: World, run: Path, homes: list[Path]) -> dict[str, Any]:
    """Each rank stands in a folder of its own, as on two machines, and sees `run` there."""
    world = replace(world, local_rank=0)
    os.chdir(homes[world.rank])
    rank = Ranks(world, run)
    try:
        rank.load(run / "checkpoints" / "step-00000002")
        named = ""
    except RawloopError as error:
        named = str(error)
    loaded, told = rank.load(), []
    for which in ("latest", "other/checkpoints/step-00000001"):
        try:
            choose(Path("other"), which, world)
        except UserError as error:
            told.append(str(error))
    return {"named": named, "loaded": loaded, "other": told}


def test_loading_on_more_ranks_than_saved_where_one_finds_damage(tmp_path: Path, run_ranks: RunRanks) -> None:
    seed_all(0, 0)
    run, homes = Path("run"), [tmp_path / "a", tmp_path / "b"]
    writer = Ranks(World(), homes[0] / run)
    writer.save(1)
    drawn = draw()
    writer.save(2)
    shutil.copytree(homes[0], homes[1])
    (homes[1] / run / "checkpoints" / "step-00000002" / "state" / "counter.json").write_text('{"value": 8}')
    for home in homes:  # each machine has a whole checkpoint of its own: the random streams are others
        Ranks(World(), home / "other").save(1)
        draw()
    first, second = run_ranks(loading, run, homes)
    differ = r"the ranks differ: rank 1 has the checkpoint step 1, digest \w{16}, rank 0 has step 1, digest \w{16}:"
    assert [bool(re.match(differ, told)) for told in first["other"] + second["other"]] == [True] * 4
    for outcome in (first, second):
        assert outcome["named"].startswith("rank 1: ") == (outcome is first)
        assert "state/counter.json has " in outcome["named"]
        assert outcome["loaded"][:2] == (1, 7)
    assert first["loaded"][2] == drawn
    assert second["loaded"][2] != drawn
    said = {(event["rank"], event["kind"]): event["reason"] for home in homes for event in read_events(home / run)}
    skipped = "skipped a damaged checkpoint: rank 1: run/checkpoints/step-00000002: state/counter.json"
    assert skipped in said[0, "warning"]
    assert said[1, "restore"] == "this rank has no stored state of rng and starts afresh: 1 rank(s) wrote it"


class Timed(Counter):
    """Notes when it is restored."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.began = time.monotonic()
        time.sleep(0.1)
        super().load_state_dict(state)
        self.ended = time.monotonic()


def restoring(world: World, run: Path) -> tuple[int, float, float]:
    """Restore as one of two ranks of a machine; return how many files were hashed, and when the part was restored."""
    Ranks(world, run).save(1)
    counter, hashed = Timed(0), []
    rank = Ranks(replace(world, local_rank=world.rank), run)
    digest = hashlib.file_digest
    hashlib.file_digest = lambda file, *rest: hashed.append(file.name) or digest(file, *rest)  # type: ignore
    try:
        with rank.manager(counter) as manager:
            manager.load()
            manager.load(run / "checkpoints" / "step-00000001")
    finally:
        hashlib.file_digest = digest
    assert counter.value == 7
    return len([name for name in hashed if not str(name).endswith("MANIFEST.json")]), counter.began, counter.ended


def test_one_rank_of_a_machine_reads_all_files_and_they_restore_one_after_another(
    tmp_path: Path, run_ranks: RunRanks
) -> None:
    (first, _, ended), (second, began, _) = run_ranks(restoring, tmp_path / "run")
    assert first == 2 * 5  # counter.json, and a json and tensors of each rank's random streams, each time
    assert second == 0
    assert ended <= began
