"""Slots: which one is the newest, what rotation deletes, and what is put right after a kill."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from rawloop.checkpoint import placing, slots
from rawloop.checkpoint.best import BestRecord
from rawloop.checkpoint.slots import step_of
from rawloop.checkpoint.writer import Contents, write_slot
from rawloop.pack import pack


def write(slot: Path, step: int, value: float = 0.0, best: BestRecord | None = None) -> Path:
    write_slot(slot, Contents(step, {}, {"x": pack({"step": step, "value": value})}, [{}], {}, best))
    return slot


def write_step(run: Path, step: int, value: float = 0.0) -> Path:
    return write(run / "checkpoints" / slots.slot_name(step), step, value)


def steps(run: Path) -> list[int]:
    return [step_of(slot) for slot in slots.find_slots(run)]


def value_in(slot: Path) -> float:
    return float(json.loads((slot / "state" / "x.json").read_text())["value"])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_slots_are_found_by_number_and_nothing_else_is(tmp_path: Path) -> None:
    assert slots.find_slots(tmp_path) == []
    for step in (500, 99_999_999, 123_456_789, 20):
        write_step(tmp_path, step)
    for name in (".tmp-step-00000030", ".trash-step-00000040", "step-x", "discarded", "step-00000050-2"):
        (tmp_path / "checkpoints" / name).mkdir()
    (tmp_path / "checkpoints" / "step-00000060").write_text("a file")
    assert steps(tmp_path) == [123_456_789, 99_999_999, 500, 20]


def test_the_newest_whole_slot_is_found_past_damaged_ones(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        write_step(tmp_path, step)
    folder = tmp_path / "checkpoints"
    (folder / "step-00000040" / "MANIFEST.json").unlink()
    (folder / "step-00000030" / "state" / "x.json").write_text("{}")
    found = slots.find_latest(tmp_path)
    assert found.slot == folder / "step-00000020"
    assert [path.name for path in found.damaged] == ["step-00000040", "step-00000030"]
    assert "never completed" in found.damaged[folder / "step-00000040"]
    assert slots.find_latest(tmp_path / "none") == (None, {})


@pytest.mark.parametrize(
    ("keep", "left"), [(1, [60]), (3, [60, 50, 40]), (99, [60, 50, 40, 30]), (0, [60, 50, 40, 30])]
)
def test_rotation_keeps_the_newest(tmp_path: Path, keep: int, left: list[int]) -> None:
    for step in (30, 40, 50, 60):
        write_step(tmp_path, step)
    placing.rotate(tmp_path, 60, keep)
    assert steps(tmp_path) == left


@pytest.mark.parametrize(
    ("keep", "every", "left"),
    [
        (1, 40, [80, 70, 40]),
        (2, 40, [80, 70, 60, 40]),
        (1, 70, [80, 70]),
        (1, 1000, [80]),
        (0, 40, [80, 70, 60, 50, 40, 30]),
        (1, 10, [80, 70, 60, 50, 40, 30]),
    ],
)
def test_rotation_spares_multiples_and_does_not_count_them(
    tmp_path: Path, keep: int, every: int, left: list[int]
) -> None:
    for step in (30, 40, 50, 60, 70, 80):
        write_step(tmp_path, step)
        placing.rotate(tmp_path, step, keep, every)
    assert steps(tmp_path) == left


def test_rotation_never_deletes_what_was_just_written_or_is_later(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        write_step(tmp_path, step)
    placing.rotate(tmp_path, 20, 1)
    assert steps(tmp_path) == [40, 30, 20]


def test_a_slot_takes_the_place_of_one_of_its_name(tmp_path: Path) -> None:
    slot = write_step(tmp_path, 5, 1.0)
    write_step(tmp_path, 5, 0.5)
    assert value_in(slot) == 0.5
    assert names(slot.parent) == ["step-00000005"]


@pytest.mark.parametrize("gives_up", [True, False])
def test_a_replaced_slot_whose_manifest_cannot_be_read_is_kept_aside(tmp_path: Path, gives_up: bool) -> None:
    """Its weights may be whole, and all that there is of that step."""
    slot = write_step(tmp_path, 5, 1.0)
    (slot / "MANIFEST.json").unlink()
    placing.put_in_place(write(tmp_path / "made", 5, 0.5), slot, gives_up=gives_up)
    assert value_in(slot) == 0.5
    assert value_in(tmp_path / "checkpoints" / "discarded" / slot.name) == 1.0
    assert not slot.with_name(f".old-{slot.name}").exists()


def kill_before_rename_of(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    rename = Path.rename

    def kill(path: Path, target: Path) -> Path:
        if path.name == name:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", kill)


def test_what_is_given_up_is_aside_before_anything_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the two renames: of a name beside its successor, the next start would delete it."""
    slot = write_step(tmp_path, 5, 1.0)
    made = write(tmp_path / "made", 5, 0.5)
    kill_before_rename_of(monkeypatch, "made")
    with pytest.raises(KeyboardInterrupt):
        placing.put_in_place(made, slot, gives_up=True)
    placing.clean_up(tmp_path)
    (kept,) = (tmp_path / "checkpoints" / "discarded").iterdir()
    assert value_in(kept) == 1.0


def test_a_damaged_slot_of_a_replacement_that_was_killed_is_kept_aside(tmp_path: Path) -> None:
    folder = write_step(tmp_path, 5, 0.5).parent
    (write(folder / ".old-step-00000005", 5, 1.0) / "MANIFEST.json").write_text("{")
    kept = folder / "discarded" / "step-00000005"
    said = [f"moved .old-step-00000005, left by a run that ended while saving, to {kept}"]
    assert placing.clean_up(tmp_path) == said
    assert value_in(kept) == 1.0


def test_a_replacement_that_fails_between_its_renames_is_undone_at_once(tmp_path: Path) -> None:
    slot = write_step(tmp_path, 5, 1.0)
    for gives_up in (False, True):
        with pytest.raises(FileNotFoundError):
            placing.put_in_place(tmp_path / "none", slot, gives_up=gives_up)
        assert steps(tmp_path) == [5]
        assert value_in(slot) == 1.0


def test_a_replacement_killed_after_its_renames_is_finished(tmp_path: Path) -> None:
    slot = write_step(tmp_path, 5, 0.5)
    write(slot.with_name(".old-step-00000005"), 5, 1.0)
    placing.clean_up(tmp_path)
    assert names(slot.parent) == ["step-00000005"]
    assert value_in(slot) == 0.5


# -- best --------------------------------------------------------------------------------------------------------------


def record(step: int, value: float, metric: str = "eval_loss", mode: Any = "min") -> BestRecord:
    return BestRecord(metric, mode, value, step)


def write_best(run: Path, step: int, value: float, metric: str = "eval_loss", mode: Any = "min") -> Path:
    """Save a step as the manager does, and let `best` point to it."""
    slot, best = run / "checkpoints" / slots.slot_name(step), record(step, value, metric, mode)
    write(slot, step, value, best)
    assert placing.set_best(run, slot, best) == []
    return slot


def pointed(run: Path) -> str:
    """Where `best` points to, which link and best.json agree about."""
    content = json.loads((run / "best.json").read_text())
    assert os.readlink(run / "best") == content["slot"]
    assert slots.find_best(run) == run / content["slot"]
    return str(content["slot"])


def aside(run: Path) -> dict[str, float]:
    folder = run / "checkpoints" / "discarded"
    return {name: value_in(folder / name) for name in names(folder)} if folder.exists() else {}


def test_best_is_a_relative_link_to_a_slot_and_best_json_says_of_what(tmp_path: Path) -> None:
    assert slots.find_best(tmp_path) is None
    assert slots.best_record(tmp_path) is None
    write_best(tmp_path, 5, 0.5)
    assert pointed(tmp_path) == "checkpoints/step-00000005"
    assert json.loads((tmp_path / "best.json").read_text()) == {
        "metric": "eval_loss",
        "mode": "min",
        "value": 0.5,
        "step": 5,
        "slot": "checkpoints/step-00000005",
    }
    write_best(tmp_path, 6, 0.25)
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert pointed(moved) == "checkpoints/step-00000006"
    assert value_in(moved / "best") == 0.25
    assert slots.resolve_best(moved / "best") == moved / "checkpoints" / "step-00000006"
    assert names(moved) == ["best", "best.json", "checkpoints"]


def test_rotation_spares_the_best_and_does_not_count_it(tmp_path: Path) -> None:
    write_best(tmp_path, 10, 0.5)
    for step in (20, 30, 40):
        write_step(tmp_path, step)
        placing.rotate(tmp_path, step, 1)
        assert steps(tmp_path) == [step, 10]
    write_best(tmp_path, 50, 0.25)  # from now on 10 is one of many
    placing.rotate(tmp_path, 50, 1)
    assert steps(tmp_path) == [50, 40]


def test_best_follows_a_slot_that_is_set_aside(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write_step(tmp_path, step)
    write_best(tmp_path, 30, 0.5)
    placing.set_aside(tmp_path, 10)
    assert pointed(tmp_path) == "checkpoints/discarded/step-00000030"
    write_step(tmp_path, 30, 0.75)
    assert value_in(tmp_path / "best") == 0.5  # not the new slot of that step
    write_best(tmp_path, 40, 0.25)
    assert pointed(tmp_path) == "checkpoints/step-00000040"
    assert aside(tmp_path) == {"step-00000020": 0.0, "step-00000030": 0.5}


def test_a_best_slot_is_replaced_only_by_a_better_one(tmp_path: Path) -> None:
    """Saved again without an evaluation, its weights may be others than those that were evaluated."""
    slot = write_best(tmp_path, 5, 0.5)
    write(slot, 5, 0.75)
    assert pointed(tmp_path) == "checkpoints/discarded/step-00000005"
    assert (value_in(slot), value_in(tmp_path / "best")) == (0.75, 0.5)
    write_best(tmp_path, 5, 0.25)
    write_best(tmp_path, 5, 0.125)
    assert pointed(tmp_path) == "checkpoints/step-00000005"
    assert aside(tmp_path) == {"step-00000005": 0.5}


@pytest.mark.parametrize(
    ("metric", "mode", "value", "kept"),
    [
        ("eval_loss", "min", 0.25, False),
        ("eval_loss", "min", 0.5, False),
        ("eval_loss", "min", 0.75, True),
        ("eval_loss", "max", 0.25, True),
        ("accuracy", "min", 0.25, True),
    ],
)
@pytest.mark.parametrize("step", [5, 6])
def test_a_best_that_was_not_surpassed_is_kept_aside(
    tmp_path: Path, metric: str, mode: str, value: float, kept: bool, step: int
) -> None:
    """As when a run goes on with another metric."""
    write_best(tmp_path, 5, 0.5)
    write_best(tmp_path, step, value, metric, mode)
    assert pointed(tmp_path) == f"checkpoints/step-0000000{step}"
    assert aside(tmp_path) == ({"step-00000005": 0.5} if kept else {})


def test_a_best_that_is_set_aside_and_killed_between_is_still_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_best(tmp_path, 30, 0.5)
    for name in ("step-00000030", ".tmp-best"):  # before the slot is moved, before the link is replaced
        with monkeypatch.context() as patch:
            kill_before_rename_of(patch, name)
            with pytest.raises(KeyboardInterrupt):
                placing.set_aside(tmp_path, 10)
        best = slots.find_best(tmp_path)
        assert best is not None
        assert value_in(best) == 0.5
    placing.clean_up(tmp_path)
    assert placing.repair_best(tmp_path) == []
    assert pointed(tmp_path) == "checkpoints/discarded/step-00000030"


@pytest.mark.parametrize("damaged", ["best.json", "best"])
@pytest.mark.parametrize("content", [None, b'{"value": 1.0}', b"torn {", b"\xff\x80", b'{"slot": "../secret"}'])
def test_best_json_and_the_link_are_made_to_agree(tmp_path: Path, damaged: str, content: bytes | None) -> None:
    write_best(tmp_path, 4, 0.5)
    write_best(tmp_path, 5, 0.25)
    before = (tmp_path / "best.json").read_bytes()
    (tmp_path / damaged).unlink()
    if damaged == "best":
        (tmp_path / "best").symlink_to({None: "/etc", b"torn {": "checkpoints"}.get(content, slots.slot_name(4)))
    elif content is not None:
        (tmp_path / "best.json").write_bytes(content)
    best = slots.find_best(tmp_path)
    assert best is not None
    assert value_in(best) == 0.25
    assert placing.repair_best(tmp_path) == []
    assert pointed(tmp_path) == "checkpoints/step-00000005"
    assert (tmp_path / "best.json").read_bytes() == before


def test_a_best_that_is_gone_or_damaged_is_said(tmp_path: Path) -> None:
    assert placing.repair_best(tmp_path) == []
    slot = write_best(tmp_path, 5, 0.25)
    (slot / "MANIFEST.json").write_text("")
    assert placing.repair_best(tmp_path) == [f"the best checkpoint, {slot}, is damaged: its manifest cannot be read"]
    assert slots.best_record(tmp_path) == record(5, 0.25)  # best.json says it too
    slot.rename(tmp_path / "elsewhere")
    assert placing.repair_best(tmp_path) == [f"{tmp_path / 'best'} points to a checkpoint that does not exist"]
    assert slots.find_best(tmp_path) is None


def test_without_links_best_json_alone_is_the_pointer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "symlink", refuse)
    slot = write(tmp_path / "checkpoints" / "step-00000005", 5, 0.5, record(5, 0.5))
    (said,) = placing.set_best(tmp_path, slot, record(5, 0.5))
    assert said.endswith("best.json alone says which checkpoint is the best")
    assert names(tmp_path) == ["best.json", "checkpoints"]
    assert slots.find_best(tmp_path) == slot
    assert slots.resolve_best(tmp_path / "best") == slot
    placing.rotate(tmp_path, 5, 1)
    assert placing.set_aside(tmp_path, 0) == [tmp_path / "checkpoints" / "discarded" / "step-00000005"]
    assert slots.find_best(tmp_path) == tmp_path / "checkpoints" / "discarded" / "step-00000005"


def old_best(run: Path, step: int, value: float) -> None:
    """The layout of older versions: `best` is a slot of its own."""
    write(run / "best", step, value, record(step, value))
    content = {**record(step, value)._asdict(), "folder": "best"}
    (run / "best.json").write_text(json.dumps(content))


@pytest.mark.parametrize("steps", [[4], [4, 5]])
def test_a_best_folder_of_an_older_version_becomes_a_slot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[int]
) -> None:
    for step in steps:
        write_step(tmp_path, step)
    old_best(tmp_path, 5, 0.5)
    assert slots.find_best(tmp_path) == tmp_path / "best"
    assert slots.best_record(tmp_path) == record(5, 0.5)
    with monkeypatch.context() as patch:
        kill_before_rename_of(patch, "best")
        with pytest.raises(KeyboardInterrupt):
            placing.adopt_best(tmp_path)
        assert slots.find_best(tmp_path) == tmp_path / "best"
    (said,) = placing.adopt_best(tmp_path)
    assert said.endswith(f"a folder where a link must be, to {tmp_path / 'checkpoints/discarded/step-00000005'}")
    assert pointed(tmp_path) == "checkpoints/discarded/step-00000005"
    assert value_in(tmp_path / "best") == 0.5
    assert placing.adopt_best(tmp_path) == []


@pytest.mark.parametrize("damaged", [False, True])
def test_a_run_that_was_copied_with_its_links_followed_has_one_best_again(tmp_path: Path, damaged: bool) -> None:
    write_best(tmp_path / "run", 5, 0.5)
    run = tmp_path / "copy"
    shutil.copytree(tmp_path / "run", run)
    assert slots.best_record(run) == record(5, 0.5)
    if damaged:
        (run / "checkpoints" / "step-00000005" / "state" / "x.json").write_text("")
    (said,) = placing.adopt_best(run)
    assert said.startswith("moved" if damaged else f"removed {run / 'best'}, a copy of ")
    assert pointed(run) == f"checkpoints/{'discarded/' if damaged else ''}step-00000005"
    assert value_in(run / "best") == 0.5


def test_a_damaged_best_folder_of_an_older_version_is_kept_aside(tmp_path: Path) -> None:
    old_best(tmp_path, 5, 0.5)
    (tmp_path / "best" / "MANIFEST.json").unlink()
    write_best(tmp_path, 6, 0.75)
    assert pointed(tmp_path) == "checkpoints/step-00000006"
    assert aside(tmp_path) == {"best": 0.5}


def test_a_step_slot_killed_while_being_replaced_is_still_found(tmp_path: Path) -> None:
    slot = write_step(tmp_path, 10)
    slot.rename(slot.with_name(".old-step-00000010"))
    found = slots.find_latest(tmp_path).slot
    assert found is not None
    assert found.name == ".old-step-00000010"
    placing.clean_up(tmp_path)
    assert slots.find_latest(tmp_path).slot == slot


def test_clean_up_removes_leftovers_and_nothing_of_the_user(tmp_path: Path) -> None:
    folder = write_step(tmp_path, 10).parent
    for name in (".tmp-step-00000020", ".trash-step-00000005"):
        (folder / name / "state").mkdir(parents=True)
    (tmp_path / ".tmp-best.json").write_text("{")
    (tmp_path / ".tmp-best").symlink_to("checkpoints/step-00000010")
    for name in (".tmp-notes", ".old-thesis", ".trash-me"):
        (tmp_path / name).mkdir()
    assert len(placing.clean_up(tmp_path)) == 4
    assert names(tmp_path) == [".old-thesis", ".tmp-notes", ".trash-me", "checkpoints"]
    assert names(folder) == ["step-00000010"]
    assert placing.clean_up(tmp_path) == []


def test_later_slots_are_set_aside_and_never_overwritten_there(tmp_path: Path) -> None:
    for _ in range(2):
        for step in (10, 20, 30):
            write_step(tmp_path, step)
        moved = placing.set_aside(tmp_path, 10)
        assert len(moved) == 2
        assert steps(tmp_path) == [10]
    aside = tmp_path / "checkpoints" / "discarded"
    assert names(aside) == ["step-00000020", "step-00000020-2", "step-00000030", "step-00000030-2"]


def test_rotation_and_cleaning_remove_links_and_not_what_they_lead_to(tmp_path: Path) -> None:
    run, outside = tmp_path / "run", write(tmp_path / "outside" / "step-00000001", 1)
    write_step(run, 10)
    (run / "checkpoints" / "step-00000020").symlink_to(outside)
    write_step(run, 20, 0.5)
    assert not (run / "checkpoints" / "step-00000020").is_symlink()
    for name in ("step-00000001", ".tmp-step-00000002", ".trash-step-00000001"):
        (run / "checkpoints" / name).symlink_to(outside)
    placing.rotate(run, 20, keep_last=2)
    placing.clean_up(run)
    assert names(run / "checkpoints") == ["step-00000010", "step-00000020"]
    assert value_in(outside) == 0.0
