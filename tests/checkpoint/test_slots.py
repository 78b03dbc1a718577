"""Slots: which one is the newest, what rotation deletes, and what is put right after a kill."""

import json
from pathlib import Path

import pytest

from rawloop.checkpoint import slots
from rawloop.checkpoint.manifest import step_of
from rawloop.checkpoint.pack import pack
from rawloop.checkpoint.writer import Contents, temporary_of, write_slot
from rawloop.errors import CheckpointError


def write(slot: Path, step: int, value: float = 0.0) -> Path:
    meta = {"best": {"metric": "eval_loss", "value": value, "step": step}}
    write_slot(slot, Contents(step, meta, {}, {"x": pack({"step": step, "value": value})}, [{}], {}))
    return slot


def write_step(run: Path, step: int) -> Path:
    return write(run / "checkpoints" / slots.slot_name(step), step)


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
    slots.rotate(tmp_path, 60, keep)
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
        slots.rotate(tmp_path, step, keep, every)
    assert steps(tmp_path) == left


def test_rotation_never_deletes_what_was_just_written_or_is_later(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        write_step(tmp_path, step)
    slots.rotate(tmp_path, 20, 1)
    assert steps(tmp_path) == [40, 30, 20]


def test_a_slot_takes_the_place_of_one_of_its_name(tmp_path: Path) -> None:
    slot = write(tmp_path / "best", 5, 1.0)
    write(slot, 6, 0.5)
    assert value_in(slot) == 0.5
    assert names(tmp_path) == ["best"]


def test_a_later_best_that_was_given_up_is_kept_aside(tmp_path: Path) -> None:
    for value in (0.5, 0.4):
        write(tmp_path / "best", 900, value)
        write(tmp_path / "best", 600, 0.8)
    kept = tmp_path / "checkpoints" / "discarded"
    assert names(kept) == ["best-step-00000900", "best-step-00000900-2"]
    assert value_in(kept / "best-step-00000900-2") == 0.4
    assert value_in(tmp_path / "best") == 0.8


@pytest.mark.parametrize("gives_up", [True, False])
def test_a_replaced_slot_whose_manifest_cannot_be_read_is_kept_aside(tmp_path: Path, gives_up: bool) -> None:
    """Its weights may be whole, and all that there is of that step."""
    for slot in (tmp_path / "best", tmp_path / "checkpoints" / "step-00000005"):
        write(slot, 5, 1.0)
        (slot / "MANIFEST.json").unlink()
        slots.put_in_place(write(tmp_path / "made", 5, 0.5), slot, gives_up=gives_up)
        assert value_in(slot) == 0.5
        assert value_in(tmp_path / "checkpoints" / "discarded" / slot.name) == 1.0
        assert not slot.with_name(f".old-{slot.name}").exists()


@pytest.mark.parametrize("name", ["best", "checkpoints/step-00000005"])
def test_what_is_given_up_is_aside_before_anything_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Killed between the two renames: of a name beside its successor, the next start would call it surpassed."""
    slot, rename = write(tmp_path / name, 5, 1.0), Path.rename

    def kill(path: Path, target: Path) -> Path:
        if path.name == "made":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", kill)
    with pytest.raises(KeyboardInterrupt):
        slots.put_in_place(write(tmp_path / "made", 5, 0.5), slot, gives_up=True)
    slots.clean_up(tmp_path)
    (kept,) = (tmp_path / "checkpoints" / "discarded").iterdir()
    assert value_in(kept) == 1.0


def test_what_could_not_be_set_aside_is_not_deleted_by_the_next_save(tmp_path: Path) -> None:
    write(tmp_path / "best", 5, 1.0)
    write(tmp_path / ".old-best", 4, 0.1)  # better than what follows, and a full disk kept it from its place
    write(tmp_path / "best", 6, 0.9)
    assert value_in(tmp_path / "checkpoints" / "discarded" / "best-step-00000004") == 0.1
    assert value_in(tmp_path / "best") == 0.9


@pytest.mark.parametrize("best", [{"metric": "accuracy", "mode": "max"}, {"metric": "eval_loss", "mode": "max"}])
def test_the_best_by_another_measure_is_kept_aside(tmp_path: Path, best: dict[str, str]) -> None:
    write(tmp_path / "best", 5, 1.0)
    meta = {"best": {**best, "value": 2.0, "step": 6}}
    write_slot(tmp_path / "best", Contents(6, meta, {}, {"x": pack({"step": 6, "value": 2.0})}, [{}], {}))
    assert value_in(tmp_path / "checkpoints" / "discarded" / "best-step-00000005") == 1.0


def test_a_damaged_slot_of_a_replacement_that_was_killed_is_kept_aside(tmp_path: Path) -> None:
    write(tmp_path / "best", 6, 0.5)
    (write(tmp_path / ".old-best", 5, 1.0) / "MANIFEST.json").write_text("{")
    kept = tmp_path / "checkpoints" / "discarded" / "best"
    assert slots.clean_up(tmp_path) == [f"moved .old-best, left by a run that ended while saving, to {kept}"]
    assert value_in(kept) == 1.0


def test_a_replacement_that_fails_between_its_renames_is_undone_at_once(tmp_path: Path) -> None:
    slot = write(tmp_path / "best", 5, 1.0)
    with pytest.raises(FileNotFoundError):
        slots.put_in_place(tmp_path / ".tmp-best", slot)
    assert names(tmp_path) == ["best"]
    assert value_in(slot) == 1.0


def test_a_replacement_killed_between_its_renames_is_undone(tmp_path: Path) -> None:
    slot = write(tmp_path / "best", 5, 1.0)
    next_one = write(tmp_path / "made", 6, 0.5)
    slot.rename(tmp_path / ".old-best")
    next_one.rename(temporary_of(slot))
    assert slots.find_best(tmp_path) == tmp_path / ".old-best"  # seen by readers even before it is put back
    said = slots.clean_up(tmp_path)
    assert said == [
        "put best back: it was being replaced when the run ended",
        "removed .tmp-best, left by a run that ended while saving",
    ]
    assert value_in(slot) == 1.0
    assert names(tmp_path) == ["best"]


def test_a_replacement_killed_after_its_renames_is_finished(tmp_path: Path) -> None:
    write(tmp_path / "best", 6, 0.5)
    write(tmp_path / ".old-best", 5, 1.0)
    assert slots.find_best(tmp_path) == tmp_path / "best"
    slots.clean_up(tmp_path)
    assert names(tmp_path) == ["best"]
    assert value_in(tmp_path / "best") == 0.5


def test_a_step_slot_killed_while_being_replaced_is_still_found(tmp_path: Path) -> None:
    slot = write_step(tmp_path, 10)
    slot.rename(slot.with_name(".old-step-00000010"))
    found = slots.find_latest(tmp_path).slot
    assert found is not None
    assert found.name == ".old-step-00000010"
    slots.clean_up(tmp_path)
    assert slots.find_latest(tmp_path).slot == slot


def test_clean_up_removes_leftovers_and_nothing_of_the_user(tmp_path: Path) -> None:
    folder = write_step(tmp_path, 10).parent
    for name in (".tmp-step-00000020", ".trash-step-00000005"):
        (folder / name / "state").mkdir(parents=True)
    (tmp_path / ".tmp-best.json").write_text("{")
    for name in (".tmp-notes", ".old-thesis", ".trash-me"):
        (tmp_path / name).mkdir()
    assert len(slots.clean_up(tmp_path)) == 3
    assert names(tmp_path) == [".old-thesis", ".tmp-notes", ".trash-me", "checkpoints"]
    assert names(folder) == ["step-00000010"]
    assert slots.clean_up(tmp_path) == []


def test_later_slots_are_set_aside_and_never_overwritten_there(tmp_path: Path) -> None:
    for _ in range(2):
        for step in (10, 20, 30):
            write_step(tmp_path, step)
        moved = slots.set_aside(tmp_path, 10)
        assert len(moved) == 2
        assert steps(tmp_path) == [10]
    aside = tmp_path / "checkpoints" / "discarded"
    assert names(aside) == ["step-00000020", "step-00000020-2", "step-00000030", "step-00000030-2"]


def test_best_json_says_what_the_best_slot_says(tmp_path: Path) -> None:
    assert slots.note_best(tmp_path) is None
    assert names(tmp_path) == []
    write(tmp_path / "best", 5, 0.25)
    expected = {"metric": "eval_loss", "value": 0.25, "step": 5, "folder": "best"}
    for stale in (None, b'{"value": 1.0}', b"torn {", b"\xff\x80"):
        if stale is not None:
            (tmp_path / "best.json").write_bytes(stale)
        slots.note_best(tmp_path)
        assert json.loads((tmp_path / "best.json").read_text()) == expected
    (tmp_path / "best" / "MANIFEST.json").write_text("")
    with pytest.raises(CheckpointError):
        slots.note_best(tmp_path)


@pytest.mark.parametrize("to", ["slot", "outside", "nowhere"])
def test_a_link_in_the_place_of_a_slot_is_removed_and_not_followed(tmp_path: Path, to: str) -> None:
    run, outside = tmp_path / "run", write(tmp_path / "outside", 3, 0.5)
    slot = write_step(run, 10)
    link = run / "best"
    link.symlink_to({"slot": "checkpoints/step-00000010", "outside": str(outside), "nowhere": "none"}[to])
    before = {path: path.read_bytes() for folder in (slot, outside) for path in folder.rglob("*") if path.is_file()}
    assert value_in(write(link, 20, 0.25)) == 0.25
    assert not link.is_symlink()
    assert {path: path.read_bytes() for path in before} == before
    assert names(run) == ["best", "checkpoints"]
    assert slots.clean_up(run) == []


def test_rotation_and_cleaning_remove_links_and_not_what_they_lead_to(tmp_path: Path) -> None:
    run, outside = tmp_path / "run", write(tmp_path / "outside" / "step-00000001", 1)
    write_step(run, 10)
    for name in ("step-00000001", ".tmp-step-00000002", ".trash-step-00000001"):
        (run / "checkpoints" / name).symlink_to(outside)
    slots.rotate(run, 10, keep_last=1)
    slots.clean_up(run)
    assert names(run / "checkpoints") == ["step-00000010"]
    assert value_in(outside) == 0.0


def test_a_slot_in_the_place_of_the_best_that_is_none_is_said(tmp_path: Path) -> None:
    write_slot(tmp_path / "best", Contents(3, {}, {}, {"x": pack(1)}, [{}], {}))
    assert slots.kept_best(tmp_path) is None
    with pytest.raises(CheckpointError, match="its manifest does not say of which evaluation it is the best"):
        slots.note_best(tmp_path)
