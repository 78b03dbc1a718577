"""Asynchronous saves: a checkpoint has the state of its step, failures are reported, and nothing is left behind."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from rawloop.checkpoint.best import BestRecord
from rawloop.checkpoint.config import CheckpointConfig
from rawloop.checkpoint.manager import CheckpointManager
from rawloop.checkpoint.slots import find_best, find_slots, verify
from rawloop.contracts import FolderState, Stateful
from rawloop.dist import World
from rawloop.errors import CheckpointError, RawloopError
from rawloop.records import Records, RecordsConfig, read_events
from tests.forks import Forks


class Weights:
    """A state that training changes in place."""

    def __init__(self) -> None:
        self.tensor = torch.zeros(1000)

    def state_dict(self) -> dict[str, Any]:
        return {"tensor": self.tensor, "step": self.tensor[0].item()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tensor.copy_(state["tensor"])


class Gate:
    """Files that are written when the gate opens, or refused."""

    folder = "adapter"

    def __init__(self) -> None:
        self.open, self.refuses, self.copies = threading.Event(), False, 0

    def snapshot(self, copy: bool) -> Callable[[Path], None]:
        assert copy
        self.copies += 1
        refuses = self.refuses

        def write(folder: Path) -> None:
            self.open.wait(30)
            if refuses:
                raise OSError(28, "No space left on device")
            (folder / "file").write_text("x")

        return write

    def load(self, folder: Path) -> None:
        assert (folder / "file").read_text() == "x"


class Saving:
    """A manager in a run, with its parts at hand."""

    def __init__(self, run: Path, manager: CheckpointManager, weights: Weights, gate: Gate) -> None:
        self.run, self.manager, self.weights, self.gate = run, manager, weights, gate

    def names(self) -> list[str]:
        return [slot.name[-1] for slot in find_slots(self.run)]

    def reasons(self, kind: str) -> list[str]:
        return [event["reason"] for event in read_events(self.run) if event["kind"] == kind]

    def wait_and_report(self) -> None:
        """Wait, then report, as the loop's next step does."""
        self.manager.newest()
        self.manager.poll()


def best(step: int, value: float) -> BestRecord:
    return BestRecord("eval_loss", "min", value, step)


@pytest.fixture
def saving(tmp_path: Path) -> Iterator[Saving]:
    with opened(tmp_path) as saving:
        yield saving


@contextmanager
def opened(run: Path) -> Iterator[Saving]:
    weights, gate = Weights(), Gate()
    parts: dict[str, Stateful | FolderState] = {"weights": weights, "adapter": gate}
    with Records(run, World(), RecordsConfig()) as records:
        manager = CheckpointManager(run, CheckpointConfig(keep_last=2), World(), records, parts)
        yield Saving(run, manager, weights, gate)
        gate.open.set()
        manager.close()


def test_what_is_saved_is_what_was_there_when_it_was_asked_for(saving: Saving, tmp_path: Path) -> None:
    saving.weights.tensor += 1
    saving.manager.save(1)
    assert saving.names() == []  # not written yet, and training goes on
    saving.weights.tensor += 1
    saving.manager.poll()
    assert saving.reasons("save") == []
    saving.gate.open.set()
    saving.wait_and_report()
    assert saving.names() == ["1"]
    assert len(saving.reasons("save")) == 1
    with opened(tmp_path) as again:
        again.manager.load()
        assert torch.equal(again.weights.tensor, torch.ones(1000))


def test_best_points_to_a_checkpoint_once_that_is_written(saving: Saving) -> None:
    saving.manager.save(1, best=best(1, 0.5))
    assert saving.gate.copies == 1
    assert find_best(saving.run) is None
    saving.gate.open.set()
    saving.wait_and_report()
    assert find_best(saving.run) == find_slots(saving.run)[0]


def test_a_step_that_is_saved_again_is_saved_as_it_is_now(saving: Saving) -> None:
    saving.gate.open.set()
    for value in (1, 2):
        saving.weights.tensor.fill_(value)
        saving.manager.save(1, best=best(1, 1 / value))
    saving.manager.finish()
    for slot in (saving.run / "best", *find_slots(saving.run)):
        saving.manager.load(slot)
        assert torch.equal(saving.weights.tensor, torch.full((1000,), 2.0))


def test_loading_waits_for_the_saves_under_way(saving: Saving) -> None:
    for value in (1, 2):  # of one step: the slot of the first save is there, whole, while the second is written
        saving.weights.tensor.fill_(value)
        saving.gate.open = threading.Event()
        timer = threading.Timer(0.3, saving.gate.open.set)
        saving.manager.save(1)
        timer.start()
        saving.weights.tensor.fill_(9)
        assert saving.manager.load().step == 1
        assert torch.equal(saving.weights.tensor, torch.full((1000,), float(value)))
        timer.join()


def test_a_save_waits_for_the_one_before(saving: Saving) -> None:
    saving.manager.save(1)
    timer = threading.Timer(0.3, saving.gate.open.set)
    timer.start()
    saving.manager.save(2)
    assert saving.names()[-1] == "1"
    timer.join()
    saving.manager.finish()
    assert saving.names() == ["2", "1"]
    waited = [event["blocked"] for event in read_events(saving.run) if event["kind"] == "save"]
    assert waited[1] > 0.2 > waited[0]


def test_failures_are_reported_and_too_many_in_a_row_end_the_run(saving: Saving) -> None:
    saving.gate.open.set()
    saving.manager.save(1)
    saving.wait_and_report()
    saving.gate.refuses = True
    for step in (2, 3):
        saving.manager.save(step)
        saving.wait_and_report()
    warnings = saving.reasons("warning")
    assert len(warnings) == 2
    assert warnings[1].startswith("cannot save step-00000003 at step 3 in ")
    assert (
        "no space is left on the disk. Still there: step-00000001; continue from it with --resume latest" in warnings[1]
    )
    assert warnings[1].endswith("; training continues, and ends after 3 failed saves in a row")
    assert saving.names() == ["1"]
    assert verify(find_slots(saving.run)[0]).step == 1
    saving.gate.refuses = False
    saving.manager.save(4)
    saving.wait_and_report()
    saving.gate.refuses = True
    for step in (5, 6):
        saving.manager.save(step)
        saving.wait_and_report()
    saving.manager.save(7)
    saving.manager.newest()
    with pytest.raises(CheckpointError, match="cannot save step-00000007"):
        saving.manager.poll()
    assert saving.names() == ["4", "1"]
    assert not [path for path in (saving.run / "checkpoints").iterdir() if path.name.startswith(".")]


def test_the_last_save_must_succeed(saving: Saving) -> None:
    saving.gate.open.set()
    saving.gate.refuses = True
    saving.manager.save(1)
    with pytest.raises(CheckpointError, match=r"cannot save step-00000001 .* Nothing was saved yet"):
        saving.manager.finish()


def test_a_best_model_that_could_not_be_written_is_known(saving: Saving) -> None:
    saving.gate.open.set()
    saving.manager.save(1, best=best(1, 0.5))
    saving.wait_and_report()
    assert saving.manager.best_record() == best(1, 0.5)
    saving.gate.refuses = True
    saving.manager.save(2, best=best(2, 0.4))
    saving.wait_and_report()
    assert saving.manager.best_record() == best(1, 0.5)
    slot = find_best(saving.run)
    assert slot is not None
    assert verify(slot).step == 1
    saving.gate.refuses = False
    saving.manager.save(3)
    with pytest.raises(CheckpointError, match="all steps are done and saved, but not the best model: cannot save step"):
        saving.manager.finish()


def test_closing_waits_for_a_running_save_and_reports_it(saving: Saving) -> None:
    saving.manager.save(1)
    timer = threading.Timer(0.2, saving.gate.open.set)
    timer.start()
    saving.manager.close()
    timer.join()
    assert verify(find_slots(saving.run)[0]).step == 1
    assert len(saving.reasons("save")) == 1
    saving.gate.refuses = True
    for step in (2, 3, 4):
        saving.manager.save(step)
        saving.manager.close()  # the run is ending by an error of its own: this one does not hide it
    assert len(saving.reasons("warning")) == 3


def test_closing_is_not_silent_where_the_event_cannot_be_written_either(
    saving: Saving, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: Any, **fields: Any) -> None:
        raise RawloopError("cannot write events.jsonl")

    saving.gate.open.set()
    saving.gate.refuses = True
    saving.manager.save(1)
    event, saving.manager.records.event = saving.manager.records.event, refuse  # type: ignore[method-assign]
    saving.manager.close()
    saving.manager.records.event = event  # type: ignore[method-assign]
    said = capsys.readouterr().err
    assert "rawloop: cannot save step-00000001" in said
    assert "The event could not be written either: cannot write events.jsonl" in said


def test_the_memory_of_a_copy_is_used_again_once_it_is_written(saving: Saving) -> None:
    saving.gate.open.set()
    places = []
    for step in (1, 2, 3):
        saving.weights.tensor += 1
        saving.manager.save(step)
        places.append(saving.manager._capture._copies["weights"].tensors["/tensor"].data_ptr())
    saving.manager.finish()
    assert len(set(places)) == 1
    assert saving.names() == ["3", "2"]
    for slot, value in zip(find_slots(saving.run), (3, 2), strict=True):
        saving.manager.load(slot)
        assert torch.equal(saving.weights.tensor, torch.full((1000,), float(value)))


def test_a_running_save_is_finished_however_a_script_ends(forks: Forks, tmp_path: Path) -> None:
    script, cases = Path(__file__).parent / "exits.py", ("end", "exit", "exception", "interrupt", "full disk")
    done = forks.run(script, tmp_path, *cases, finalize=True, check=True)
    assert done.stdout.splitlines() == ["end 0", "exit 3", "exception 1", "interrupt -2", "full disk 0"]
    for case in cases[:-1]:
        (slot,) = find_slots(tmp_path / case)
        assert verify(slot).step == 1
    assert find_slots(tmp_path / cases[-1]) == []
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("rawloop: ")]
    assert line.startswith("rawloop: cannot save step-00000001 at step 1 in ")
    assert "no space is left on the disk" in line
