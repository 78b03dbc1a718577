"""The manager in one process: what is saved is what is loaded, damage is passed over aloud, failures lose nothing."""

import errno
import json
import math
import os
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from rawloop import files
from rawloop.checkpoint import writer
from rawloop.checkpoint.best import BestRecord, BestTracker
from rawloop.checkpoint.config import CheckpointConfig
from rawloop.checkpoint.manager import CheckpointManager
from rawloop.checkpoint.slots import find_slots
from rawloop.contracts import FolderState, Stateful
from rawloop.dist import World
from rawloop.errors import CheckpointError, RawloopError, UserError
from rawloop.records import Records, RecordsConfig, read_events
from rawloop.seed import RngState, seed_all


class Holder:
    """A part with whatever state."""

    def __init__(self, **state: Any) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


class Adapter:
    """Writes a model's weights into a folder of its own, as an adapter does."""

    folder = "adapter"

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def snapshot(self, copy: bool) -> Callable[[Path], None]:
        weights = {name: tensor.clone() if copy else tensor for name, tensor in self.model.state_dict().items()}

        def write(folder: Path) -> None:
            save_file(weights, folder / "adapter_model.safetensors")
            (folder / "extra").mkdir()
            (folder / "extra" / "adapter_config.json").write_text('{"r": 8}')

        return write

    def load(self, folder: Path) -> None:
        assert json.loads((folder / "extra" / "adapter_config.json").read_text()) == {"r": 8}
        self.model.load_state_dict(load_file(folder / "adapter_model.safetensors"))


Parts = dict[str, Stateful | FolderState]


def parts() -> Parts:
    return {"counter": Holder(step=0, scale=math.inf), "adapter": Adapter(nn.Linear(4, 4)), "rng": RngState(0, 0)}


@contextmanager
def opened(run: Path, state: Parts | None = None, **config: Any) -> Iterator[CheckpointManager]:
    """A manager that saves before it goes on and does not put up with a failure, unless told otherwise."""
    settings = CheckpointConfig(**{"asynchronous": False, "max_failures": 1, **config})
    with Records(run, World(), RecordsConfig()) as records:
        manager = CheckpointManager(run, settings, World(), records, parts() if state is None else state)
        yield manager
        manager.close()


def best(step: int, value: float, metric: str = "eval_loss", mode: Any = "min") -> BestRecord:
    return BestRecord(metric, mode, value, step)


def names(run: Path) -> list[str]:
    return [slot.name for slot in find_slots(run)]


def reasons(run: Path, kind: str) -> list[str]:
    return [event["reason"] for event in read_events(run) if event["kind"] == kind]


def test_everything_comes_back_and_random_streams_continue(tmp_path: Path) -> None:
    seed_all(1, 0)
    model, tracker = nn.Linear(4, 4), BestTracker()
    tracker.consider(5, 0.5, True)
    state: Parts = {"adapter": Adapter(model), "n": Holder(a=[1, math.nan]), "best": tracker, "rng": RngState(1, 0)}
    with opened(tmp_path, state) as manager:
        slot = manager.save(5)
    weight, drawn = model.weight.detach().clone(), (torch.rand(2).tolist(), random.random())
    other = nn.Linear(4, 4)
    fresh: Parts = {"adapter": Adapter(other), "n": Holder(), "best": BestTracker(), "rng": RngState(1, 0)}
    with opened(tmp_path, fresh) as manager:
        restored = manager.load()
    assert (torch.rand(2).tolist(), random.random()) == drawn
    assert restored == (slot, 5, 1)
    assert torch.equal(other.weight, weight)
    assert isinstance(fresh["best"], BestTracker)
    assert fresh["best"].state_dict() == tracker.state_dict()
    assert isinstance(fresh["n"], Holder)
    assert str(fresh["n"].state) == "{'a': [1, nan]}"


def test_the_layout_is_the_documented_one_and_holds_no_pickle(tmp_path: Path) -> None:
    with opened(tmp_path) as manager:
        slot = manager.save(500)
    assert slot == tmp_path / "checkpoints" / "step-00000500"
    assert sorted(path.relative_to(slot).as_posix() for path in slot.rglob("*") if path.is_file()) == [
        "MANIFEST.json",
        "adapter/adapter_model.safetensors",
        "adapter/extra/adapter_config.json",
        "state/counter.json",
        "state/rng-00000.json",
        "state/rng-00000.safetensors",
    ]
    manifest = json.loads((slot / "MANIFEST.json").read_text())
    assert manifest["step"] == 500
    assert manifest["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert "adapter/extra/adapter_config.json" in manifest["files"]


@pytest.mark.parametrize(
    ("config", "due"),
    [
        ({"save_every": 3}, [3, 6, 7]),
        ({"save_every": 3, "save_at_end": False}, [3, 6]),
        ({"save_every": 0}, [7]),
        ({"save_every": 0, "save_at_end": False}, []),
        ({"save_every": 7}, [7]),
    ],
)
def test_a_save_is_due_on_its_cadence_and_at_the_end_once(
    tmp_path: Path, config: dict[str, Any], due: list[int]
) -> None:
    with opened(tmp_path, **config, keep_last=0) as manager:
        for step in range(8):
            if manager.due(step, last=step == 7):
                manager.save(step)
                assert not manager.due(step, last=True)
    assert names(tmp_path) == [f"step-{step:08d}" for step in reversed(due)]


def test_what_has_just_been_restored_is_not_saved_again(tmp_path: Path) -> None:
    with opened(tmp_path, save_every=3) as manager:
        manager.save(3)
    with opened(tmp_path, save_every=3) as manager:
        manager.load()
        assert not manager.due(3, last=False)
        assert manager.due(6, last=False)


def test_a_negative_cadence_is_refused() -> None:
    with pytest.raises(UserError, match=r"checkpoint\.save_every is -1"):
        CheckpointConfig(save_every=-1)


def test_old_checkpoints_go_and_the_best_stays(tmp_path: Path) -> None:
    with opened(tmp_path, keep_last=2) as manager:
        manager.save(1, best=best(1, 2.0))
        for step in range(2, 6):
            manager.save(step)
        assert names(tmp_path) == ["step-00000005", "step-00000004", "step-00000001"]
        manager.save(6, best=best(6, 1.5))
        for step in range(7, 10):
            manager.save(step)
    assert names(tmp_path) == ["step-00000009", "step-00000008", "step-00000006"]
    content = {"metric": "eval_loss", "mode": "min", "value": 1.5, "step": 6, "slot": "checkpoints/step-00000006"}
    assert json.loads((tmp_path / "best.json").read_text()) == content
    assert (tmp_path / "best" / "adapter" / "adapter_model.safetensors").is_file()
    with opened(tmp_path) as manager:
        assert manager.load(tmp_path / "best").slot == tmp_path / "checkpoints" / "step-00000006"
        assert manager.best_record() == best(6, 1.5)
        manager.start(6)  # of this run's own step: nothing is saved again
        assert not [event for event in read_events(tmp_path) if event["kind"] == "save" and event["step"] > 9]
    events = [event for event in read_events(tmp_path) if event["kind"] == "best"]
    assert [(event["step"], event["value"], event["metric"]) for event in events] == [
        (1, 2.0, "eval_loss"),
        (6, 1.5, "eval_loss"),
    ]


def test_going_back_takes_the_best_with_it_until_there_is_a_better_one(tmp_path: Path) -> None:
    with opened(tmp_path) as manager:
        manager.save(1)
        manager.save(3, best=best(3, 0.5))
    with opened(tmp_path, keep_last=1) as manager:
        manager.load(tmp_path / "checkpoints" / "step-00000001")
        manager.start(1)
        aside = tmp_path / "checkpoints" / "discarded" / "step-00000003"
        assert (tmp_path / "best").resolve() == aside.resolve()
        manager.save(3)
        assert (tmp_path / "best").resolve() == aside.resolve()
        assert manager.best_record() == best(3, 0.5)
        manager.save(4, best=best(4, 0.25))
        manager.save(5)
        assert (tmp_path / "best").resolve() == (tmp_path / "checkpoints" / "step-00000004").resolve()
    assert names(tmp_path) == ["step-00000005", "step-00000004"]
    assert aside.is_dir()  # what was given up is never deleted


def test_that_there_are_no_links_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(os, "symlink", refuse)
    with opened(tmp_path) as manager:
        manager.start(0)
        for step in (1, 2, 3):
            manager.save(step, best=best(step, 1 / step))
    assert [text.partition(": ")[2] for text in reasons(tmp_path, "warning")] == [
        f"{tmp_path / 'best.json'} alone says which checkpoint is the best"
    ]
    with opened(tmp_path) as manager:
        assert manager.load(tmp_path / "best").step == 3


def test_a_run_of_an_older_version_goes_on(tmp_path: Path) -> None:
    """There `best` is a folder with a slot of its own."""
    with opened(tmp_path) as manager:
        manager.save(2)
        slot = manager.save(1, best=best(1, 0.5))
    (tmp_path / "best").unlink()
    slot.rename(tmp_path / "best")
    content = {**best(1, 0.5)._asdict(), "folder": "best"}
    (tmp_path / "best.json").write_text(json.dumps(content))
    with opened(tmp_path) as manager:
        assert manager.load(tmp_path / "best").step == 1  # it can be opened before anything is written
        assert manager.load().step == 2
        assert manager.best_record() == best(1, 0.5)
        manager.start(2)
        assert reasons(tmp_path, "warning") == [
            f"moved {tmp_path / 'best'}, a folder where a link must be, to {slot.parent / 'discarded' / slot.name}"
        ]
        manager.save(3, best=best(3, 0.25))
    assert (tmp_path / "best").resolve().name == "step-00000003"
    assert names(tmp_path) == ["step-00000003", "step-00000002"]
    assert (slot.parent / "discarded" / slot.name).is_dir()


def test_multiples_of_keep_every_stay(tmp_path: Path) -> None:
    with opened(tmp_path, keep_last=1, keep_every=2) as manager:
        for step in range(6):
            manager.save(step)
    assert names(tmp_path) == ["step-00000005", "step-00000004", "step-00000002"]
    with opened(tmp_path, keep_last=1) as manager:  # without keep_every: what was kept for ever still is
        manager.save(6)
    assert names(tmp_path) == ["step-00000006", "step-00000004", "step-00000002"]
    with opened(tmp_path, keep_last=2) as manager:
        for step in (7, 8):
            manager.save(step)
    assert names(tmp_path) == ["step-00000008", "step-00000007", "step-00000004", "step-00000002"]
    (tmp_path / "checkpoints" / "step-00000007").rename(tmp_path / "checkpoints" / ".trash-step-00000007")
    with opened(tmp_path, keep_last=2) as manager:
        manager.save(9)  # those that are kept are not counted
    assert names(tmp_path) == ["step-00000009", "step-00000008", "step-00000004", "step-00000002"]


def test_a_best_slot_that_was_not_surpassed_is_set_aside(tmp_path: Path) -> None:
    """As when a run goes on from before it with other settings."""
    with opened(tmp_path) as manager:
        for record in (
            best(6, 1.0),
            best(8, 1.5),
            best(8, 1.25),  # surpasses
            best(9, 0.5, "accuracy", "max"),  # of another metric: neither surpasses
            best(9, 0.25, "accuracy", "max"),
            best(3, 0.75, "accuracy", "max"),  # surpasses, though of an earlier step
            best(2, 0.5, "wer"),  # of another metric
        ):
            manager.save(record.step, best=record)
        assert manager.best_record() == best(2, 0.5, "wer")
    left = sorted(path.name for path in (tmp_path / "checkpoints" / "discarded").iterdir())
    assert left == [f"step-0000000{step}" for step in (3, 6, 8, 9)]


def test_a_value_that_is_not_finite_is_never_written_as_the_best(tmp_path: Path) -> None:
    with opened(tmp_path) as manager, pytest.raises(AssertionError, match="never the best"):
        manager.save(1, best=best(1, math.nan))


@pytest.mark.parametrize("step", [-1, 1.5, "7", None, torch.tensor(2.0)])
def test_a_step_that_is_none_is_refused(tmp_path: Path, step: Any) -> None:
    with opened(tmp_path) as manager:
        for evaluated in (None, best(1, 1.0)):
            with pytest.raises(UserError, match=r"the step of a checkpoint is .*: it must be a whole"):
                manager.save(step, best=evaluated)
    assert names(tmp_path) == []


def test_a_step_may_be_a_number_of_numpy_or_torch_and_a_folder_a_str(tmp_path: Path) -> None:
    with Records(str(tmp_path), World(), RecordsConfig()) as records:
        manager = CheckpointManager(str(tmp_path), CheckpointConfig(), World(), records, parts())
        steps: list[Any] = [np.int64(2), torch.tensor(3)]
        for step in steps:
            manager.save(step)
        assert manager.load().step == 3
        manager.close()
    assert names(tmp_path) == ["step-00000003", "step-00000002"]


@pytest.mark.parametrize(("state", "kind"), [([nn.Linear(1, 1)], "list"), (nn.Linear(1, 1), "Linear")])
def test_parts_without_names_are_refused(tmp_path: Path, state: Any, kind: str) -> None:
    message = f"the parts of a checkpoint are a {kind}: hand in a dict of them by name"
    with pytest.raises(UserError, match=message), opened(tmp_path, state):
        pass


def test_damaged_checkpoints_are_passed_over_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with opened(tmp_path, keep_last=0) as manager:
        for step in (1, 2, 3):
            manager.save(step)
    folder = tmp_path / "checkpoints"
    (folder / "step-00000003" / "state" / "counter.json").unlink()
    data = bytearray((folder / "step-00000002" / "adapter" / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "step-00000002" / "adapter" / "adapter_model.safetensors").write_bytes(data)
    with opened(tmp_path) as manager:
        assert manager.load().step == 1
        manager.start(1)
    said = reasons(tmp_path, "warning")
    assert "state/counter.json is missing" in said[0]
    assert "adapter_model.safetensors has changed since it was written" in said[1]
    shown = capsys.readouterr().err
    assert all(reason in shown for reason in said)
    # later ones are out of the way of the next `latest`, and not lost
    assert names(tmp_path) == ["step-00000001"]
    assert len(list((folder / "discarded").iterdir())) == 2


def test_if_all_are_damaged_each_reason_and_the_way_out_are_named(tmp_path: Path) -> None:
    with opened(tmp_path) as manager:
        manager.save(2, best=best(2, 2.0))
        manager.start(1)
        manager.save(1)
    (tmp_path / "checkpoints" / "step-00000001" / "MANIFEST.json").unlink()
    with (
        opened(tmp_path) as manager,
        pytest.raises(CheckpointError, match=r"is whole.*--resume .*discarded/step-00000002: .*never compl"),
    ):
        manager.load()


def test_a_named_checkpoint_that_is_damaged_is_an_error_and_not_replaced(tmp_path: Path) -> None:
    with opened(tmp_path) as manager:
        manager.save(1)
        slot = manager.save(2)
    (slot / "state" / "counter.json").write_text("{}")
    counter = Holder(untouched=True)
    with (
        opened(tmp_path, {**parts(), "counter": counter}) as manager,
        pytest.raises(CheckpointError, match=r"step-00000002: state/counter\.json has 2 bytes, \d+ were written"),
    ):
        manager.load(slot)
    assert counter.state == {"untouched": True}


def test_paths_that_are_no_checkpoint_are_the_users_mistake(tmp_path: Path) -> None:
    with opened(tmp_path) as manager:
        with pytest.raises(UserError, match="has no checkpoint: start without --resume"):
            manager.load()
        with pytest.raises(UserError, match="is no folder"):
            manager.load(str(tmp_path / "step-1"))
        manager.save(4)
        with pytest.raises(UserError, match=r"is a run: name one of them \(step-00000004\)"):
            manager.load(tmp_path)
        with pytest.raises(UserError, match=r"a run's checkpoints: name one of them \(step-00000004\)"):
            manager.load(tmp_path / "checkpoints")
        with pytest.raises(UserError, match=r"state', which is a part of a checkpoint: name a checkpoint's"):
            manager.load(tmp_path / "checkpoints" / "step-00000004" / "state")
        (tmp_path / "empty").mkdir()
        with pytest.raises(UserError, match=r"empty', which is no checkpoint: name a checkpoint's folder, such"):
            manager.load(tmp_path / "empty")
        (tmp_path / "checkpoints" / "step-00000004").rename(tmp_path / "checkpoints" / "step-00000009")
        with pytest.raises(CheckpointError, match="its manifest is that of step 4: it was renamed, or copied"):
            manager.load()


def test_missing_and_extra_parts_are_listed_and_nothing_is_restored(tmp_path: Path) -> None:
    with opened(tmp_path, {"counter": Holder(x=1), "old": Holder(), "older": Holder()}) as manager:
        manager.save(1)
    counter = Holder(x=2)
    with (
        opened(tmp_path, {"counter": counter, "rng": RngState(0, 0)}) as manager,
        pytest.raises(CheckpointError, match="it lacks rng; it holds old, older, which this run does not have"),
    ):
        manager.load()
    assert counter.state == {"x": 2}


def test_a_state_that_disappears_after_the_check_is_not_restored_as_none(tmp_path: Path) -> None:
    counter = Holder(x=1)
    with opened(tmp_path, {"counter": counter}) as manager:
        slot = manager.save(1)
        (slot / "state" / "counter.json").unlink()
        with pytest.raises(RawloopError, match=r"FileNotFoundError: .*state/counter\.json"):
            manager.restore(slot)
    assert counter.state == {"x": 1}


def test_a_changed_version_is_said(tmp_path: Path) -> None:
    with opened(tmp_path) as manager:
        manager.versions["peft"] = "0.0.1"
        manager.save(1)
    with opened(tmp_path) as manager:
        manager.load()
    assert "(peft 0.0.1 then, " in reasons(tmp_path, "restore")[0]


def test_a_state_that_cannot_be_stored_any_more_leaves_no_trace(tmp_path: Path) -> None:
    part = Holder(x=1)
    with opened(tmp_path, {"bad": part}) as manager:
        part.state = {"x": {1, 2}}
        with pytest.raises(TypeError, match="state at /x"):
            manager.save(1)
    assert not (tmp_path / "checkpoints").exists()


class Half:
    """Not a part: it can be saved, and not loaded."""

    def state_dict(self) -> dict[str, Any]:
        return {}


class PerRankOnly(Holder):
    per_rank = True


OPTIMIZER = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
SCHEDULER = torch.optim.lr_scheduler.ExponentialLR(OPTIMIZER, 0.9)


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (OPTIMIZER, r"is a SGD, .* hand in rawloop.NamedOptimizerState\(optimizer, named\), where named\(\) gives"),
        (SCHEDULER, r"is a ExponentialLR, whose state .*: hand in rawloop.SchedulerState\(scheduler\), and"),
        (None, "is None: leave it out"),
        (np.float64(0.1), r"is a float64: hand in an object with state_dict\(\) and load_state_dict\(state\)"),
        (0.1, "is a float: .* wrap a number in such an object"),
        (torch.zeros(2), "is a Tensor: hand in an object with"),
        (Half(), "is a Half: hand in an object with"),
        (Holder, "is <class .*>, a class: hand in the object"),
        (Holder(loss=np.float64(0.1)), "is a Holder, whose state at /loss is a numpy.float64: only tensors and JSON"),
        (Holder(a={1: 2}), "is a Holder, whose state at /a has the key 1, a builtins.int: keys must be strings"),
        (Holder(a=torch.zeros(2).to_sparse()), "is a Holder, whose state at /a is a .*only dense tensors"),
        (PerRankOnly(), r"is a PerRankOnly with per_rank, but without start_afresh\(step\)"),
    ],
)
def test_a_wrong_part_is_refused_when_the_manager_is_made(tmp_path: Path, part: Any, said: str) -> None:
    with pytest.raises(UserError, match=f"^the part 'it' of a checkpoint {said}"), opened(tmp_path, {"it": part}):
        pass


class Faulty(Holder):
    def state_dict(self) -> dict[str, Any]:
        raise TypeError("a mistake in state_dict")


def test_an_error_inside_a_part_is_raised_as_it_is(tmp_path: Path) -> None:
    """It is no state that cannot be stored: its traceback shows the line."""
    with pytest.raises(TypeError, match=r"^a mistake in state_dict"), opened(tmp_path, {"it": Faulty()}):
        pass


class Elsewhere(Adapter):
    def __init__(self, folder: str) -> None:
        super().__init__(nn.Linear(2, 2))
        self.folder = folder


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"a/b": Holder()}, "'a/b' of a checkpoint has a name that no file can have"),
        ({".x": Holder()}, "has a name that no file can have: use letters, digits"),
        ({"": Holder()}, "has a name that no file can have"),
        ({7: Holder()}, "the part 7 of a checkpoint has a name that no file"),
        ({"rng-00001": Holder()}, "has the name of another part's state on one rank"),
        ({"Model": Holder(), "model": Holder()}, "have the same name"),
        ({"it": Elsewhere("../x")}, "whose folder has a name that no file can have"),
        ({"it": Elsewhere("state")}, "have the same folder"),
        ({"it": Elsewhere("x"), "at": Elsewhere("X")}, "have the same folder"),
        ({}, "a checkpoint has no parts"),
    ],
)
def test_names_that_make_no_file_are_refused(tmp_path: Path, state: Any, said: str) -> None:
    with pytest.raises(UserError, match=said), opened(tmp_path, state):
        pass


def test_numbers_of_numpy_and_torch_are_taken_for_the_best_value(tmp_path: Path) -> None:
    tracker = BestTracker()
    assert tracker.consider(np.int64(3), np.float32(0.5), True)  # type: ignore[arg-type]
    assert tracker.consider(4, torch.tensor(0.25), True)  # type: ignore[arg-type]
    with opened(tmp_path, {"best": tracker}) as manager:
        manager.save(4, best=BestRecord("eval_loss", "min", torch.tensor(0.25), 4))  # type: ignore[arg-type]
    assert json.loads((tmp_path / "best.json").read_text())["value"] == 0.25


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let this process write no file beyond `size` bytes: what a disk that runs full looks like."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def big() -> Parts:
    """Parts whose files have many sizes, so that a limit hits one file or another."""
    files: Parts = {f"p{size}": Holder(x=torch.randn(size)) for size in (10, 100, 1000, 10_000)}
    return {**files, "adapter": Adapter(nn.Linear(70, 70))}


@pytest.mark.parametrize("limit", [0, 40, 300, 2000, 6000, 25_000])
def test_a_disk_that_runs_full_loses_nothing_that_was_saved(tmp_path: Path, limit: int) -> None:
    with opened(tmp_path, big()) as manager:
        manager.save(1, best=best(1, 1.0))
        for record in (None, best(2, 0.5)):
            with largest_file(limit), pytest.raises(CheckpointError) as caught:
                manager.save(2, best=record)
            assert "larger than this process may write" in str(caught.value)
            assert "Still there: step-00000001; continue from it with --resume latest" in str(caught.value)
            event_refused = "The event could not be written either" in str(caught.value)
            assert event_refused or reasons(tmp_path, "warning")[-1] == str(caught.value)
        assert manager.load().step == 1
        assert manager.load(tmp_path / "best").step == 1
        assert manager.best_record() == best(1, 1.0)
        assert not [path for path in tmp_path.rglob("*") if path.name.startswith((".tmp", ".old", ".trash"))]
        manager.save(2)  # there is room again
        assert manager.load().step == 2


def test_a_folder_that_takes_no_files_is_said_in_words(tmp_path: Path) -> None:
    with opened(tmp_path) as manager:
        (tmp_path / "checkpoints").write_text("in the way")
        with pytest.raises(CheckpointError, match=r"cannot save step-00000001.*Nothing was saved yet"):
            manager.save(1)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(28, "x", "/disk/a"), "no space is left on the disk (/disk/a)"),
        (OSError(30, "x"), "the file system is read-only"),
        (OSError(9, "Bad file descriptor"), "[Errno 9] Bad file descriptor"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "no space is left on the disk"),
        (SafetensorError("something else"), "something else"),
    ],
)
def test_error_numbers_become_words(error: Any, text: str) -> None:
    assert files.in_words(error) == text


def test_too_little_space_is_known_before_anything_is_written(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    writer.check_space(tmp_path, int(free * 0.7))
    with pytest.raises(CheckpointError, match=r"too little space on the disk of .*: the last checkpoint took .* MB"):
        writer.check_space(tmp_path, int(free * 0.9))
    with opened(tmp_path) as manager:
        manager.save(1)
        manager._last_size = free
        with pytest.raises(
            CheckpointError, match=r"cannot save step-00000002 .* too little space.*Still there: step-0"
        ):
            manager.save(2)


def test_start_tidies_up_and_mends_best_json(tmp_path: Path) -> None:
    with opened(tmp_path) as manager:
        manager.start(0)
        manager.save(7, best=best(7, 1.0))
    (tmp_path / "best.json").unlink()
    (tmp_path / "checkpoints" / ".tmp-step-00000008").mkdir()
    aside = tmp_path / "checkpoints" / "discarded" / "step-00000007"
    with opened(tmp_path) as manager:
        manager.start(5)
    assert (tmp_path / "best.json").exists()
    assert reasons(tmp_path, "warning") == [
        "removed .tmp-step-00000008, left by a run that ended while saving",
        f"resuming from step 5: moved a later checkpoint to {aside}",
        "resuming from step 5: the best checkpoint so far is that of step 7",
    ]
    (tmp_path / "best" / "MANIFEST.json").write_text("")
    with opened(tmp_path) as manager:
        manager.start(7)
    assert reasons(tmp_path, "warning")[-1].startswith(f"the best checkpoint, {aside}, is damaged")
