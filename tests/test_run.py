"""A run of one's own objects, without a config: modes, buffers, the order of a step, and errors of any kind."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn

from rawloop.contracts import Batch, Sample, StreamLoss
from rawloop.data.batches import BatchPlan, Loader, MicroBatches, TrainWindows
from rawloop.dist import World
from rawloop.errors import InterruptedUpdate, RawloopError, TrainingError, UserError
from rawloop.loop import Run, memory_advice, train
from rawloop.losses import LossModule
from rawloop.precision.policy import PrecisionPolicy
from rawloop.records import Records, RecordsConfig, read_events
from rawloop.settings import DDPConfig

Change = Callable[[nn.Module, Batch], Any]


class Net(nn.Module):
    """A small model with dropout, a norm and a counter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(4, 1)
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.get_buffer("passes").add_(1)
        y: Tensor = self.last(self.drop(self.norm(self.first(x))))
        return y


def nothing(model: nn.Module, batch: Batch) -> None:
    """No change."""


def batches(window: int) -> Iterator[list[Batch]]:
    while True:
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(window))
        yield [Batch({"x": x}, {}, {"y": 4}, [f"sample {window}"])]
        window += 1


def run_of(folder: Path, world: World | None = None, before: Change = nothing, steps: int = 3, **more: Any) -> Run:
    torch.manual_seed(0)
    world = world or World()
    policy = PrecisionPolicy("fp32", world.device, world=world)
    model = policy.prepare(more.pop("model", None) or Net())

    def losses(model: nn.Module, batch: Batch) -> dict[str, StreamLoss]:
        before(model, batch)
        return {"y": StreamLoss(model(batch.inputs["x"]).square().sum(), 4)}

    return Run(
        module=world.wrap(LossModule(model, losses), DDPConfig()),
        windows=more.pop("windows", batches),
        policy=policy,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        lr=lambda _: 0.1,
        total_steps=steps,
        weights={"y": 1.0},
        records=Records(folder, world, RecordsConfig()),
        world=world,
        **more,
    )


def net(run: Run) -> Net:
    model = run.policy.model
    assert isinstance(model, Net)
    return model


def test_modules_stay_in_the_mode_that_they_were_given(tmp_path: Path) -> None:
    model = Net()
    model.norm.eval()
    run = run_of(tmp_path, model=model)
    with run.records:
        train(run)
    assert {name: module.training for name, module in model.named_modules()} == {
        "": True,
        "first": True,
        "norm": False,
        "drop": True,
        "last": True,
    }
    assert model.norm.running_mean is not None
    assert torch.equal(model.norm.running_mean, torch.zeros(4))


def test_a_model_in_evaluation_mode_is_refused(tmp_path: Path) -> None:
    run = run_of(tmp_path, model=Net().eval())
    with run.records, pytest.raises(UserError, match=r"the model \(Net\) is in evaluation mode.*call model.train\(\)"):
        train(run)


def test_buffers_that_move_are_found_without_being_named(tmp_path: Path) -> None:
    def spoil(model: nn.Module, batch: Batch) -> None:
        if "sample 1" in batch.ids:
            batch.inputs["x"] = batch.inputs["x"] * float("nan")

    run = run_of(tmp_path, before=spoil)
    with run.records:
        train(run)
    assert run.buffers is not None
    assert set(run.buffers.places) == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "passes"}
    assert (run.state.step, run.state.skipped) == (3, 1)
    assert net(run).get_buffer("passes") == 3  # the skipped window and the trial pass have left no trace
    assert all(torch.isfinite(buffer).all() for buffer in net(run).buffers())


def test_a_buffer_that_no_checkpoint_can_hold_is_refused(tmp_path: Path) -> None:
    model = Net()
    model._non_persistent_buffers_set.add("passes")
    run = run_of(tmp_path, model=model)
    with run.records, pytest.raises(UserError, match="training moves the buffer passes, which is registered with pers"):
        train(run)


def test_the_next_window_is_made_before_the_step_waits_for_the_device(tmp_path: Path) -> None:
    order: list[str] = []

    def watched(window: int) -> Iterator[list[Batch]]:
        for number, made in enumerate(batches(window)):
            order.append(f"window {number}")
            yield made

    run = run_of(tmp_path, windows=watched)
    step = run.policy.step

    def noted(*arguments: Any) -> Any:
        order.append(f"update {run.state.step}")
        return step(*arguments)

    run.policy.step = noted  # type: ignore[method-assign, assignment]
    with run.records:
        train(run)
    assert order == ["window 0", "window 1", "update 0", "window 2", "update 1", "update 2"]


class Bug(Exception):
    """Of a user's code."""


def ending(window: int) -> Iterator[list[Batch]]:
    yield next(batches(0))
    raise Bug("in the data")


def test_an_error_of_the_next_window_waits_until_the_step_is_done(tmp_path: Path) -> None:
    run = run_of(tmp_path, windows=ending)
    with run.records, pytest.raises(Bug, match="in the data"):
        train(run)
    assert run.state.step == run.state.visited == 1


def fail_in(world: World, place: str, folder: Path) -> tuple[str, str, int]:
    """The error that this rank ends with when rank 1 alone has a bug, and the step that it has reached."""

    def before(model: nn.Module, batch: Batch) -> None:
        if place == "loss" and world.rank == 1 and "sample 1" in batch.ids:
            raise Bug("in the loss")

    run = run_of(folder, world, before, windows=ending if place == "data" and world.rank == 1 else batches)
    try:
        with run.records:
            train(run)
    except Exception as error:
        return type(error).__name__, str(error), run.state.step
    return "", "", -1


def test_a_bug_in_the_data_of_one_rank_ends_all_ranks(run_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    first, second = run_ranks(fail_in, "data", tmp_path, timeout=290)
    assert first == ("RawloopError", "rank 1 failed: Bug: in the data", 1)
    assert second == ("Bug", "in the data", 1)


FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.6 GiB"


def test_full_memory_names_samples_and_shapes_and_what_to_change(tmp_path: Path) -> None:
    def before(model: nn.Module, batch: Batch) -> None:
        if "sample 1" in batch.ids:
            raise torch.OutOfMemoryError(FULL + "\nSee documentation for Memory Management")

    run = run_of(tmp_path, before=before)
    with run.records, pytest.raises(TrainingError) as caught:
        train(run)
    said = str(caught.value)
    assert said.startswith(f"{FULL} (at step 1, on rank 0, in the micro-batch of the samples sample 1): ")
    for words in ("x (4, 3)", "train.batch_size", "train.accumulation", "model.activation_checkpointing"):
        assert words in said
    assert "\n" not in said


def test_the_shapes_are_those_of_the_largest_micro_batch_of_a_window(tmp_path: Path) -> None:
    window = [Batch({"x": torch.zeros(samples, 3)}, {}, {}, []) for samples in (2, 5, 1)]
    run = run_of(tmp_path)
    with run.records:
        assert memory_advice(run, window).startswith("its inputs have the shapes x (5, 3); ")


@pytest.mark.parametrize("place", ["norm", "optimizer"])
def test_full_memory_in_the_update_names_the_window(tmp_path: Path, place: str) -> None:
    run = run_of(tmp_path)

    def fail(*_: Any) -> Any:
        raise torch.OutOfMemoryError(FULL)

    if place == "norm":
        run.policy.step = fail  # type: ignore[method-assign, assignment]
    else:
        run.optimizer.step = fail  # type: ignore[method-assign, assignment]
    with run.records, pytest.raises(TrainingError if place == "norm" else InterruptedUpdate) as caught:
        train(run)
    said = str(caught.value)
    assert "CUDA out of memory" in said
    assert "its inputs have the shapes x (4, 3); lower train.batch_size" in said
    assert place == "optimizer" or "in the window of the samples sample 0" in said


def test_an_error_of_the_device_in_the_update_names_the_windows_samples(tmp_path: Path) -> None:
    run = run_of(tmp_path)

    def fail(*_: Any) -> Any:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    run.policy.step = fail  # type: ignore[method-assign, assignment]
    with run.records, pytest.raises(torch.AcceleratorError) as caught:
        train(run)
    assert caught.value.__notes__ == ["at step 0, on rank 0, in the window of the samples sample 0"]


def test_an_error_of_ones_own_record_is_raised_at_the_next_step(tmp_path: Path) -> None:
    run = run_of(tmp_path, log_every=1)

    def refuse(*_: Any) -> None:
        raise Bug("in a sink")

    run.records.metrics = refuse  # type: ignore[method-assign, assignment]
    with run.records, pytest.raises(Bug, match="in a sink"):
        train(run)
    assert run.state.step == 1
    assert [event["kind"] for event in read_events(tmp_path)] == []
    assert not isinstance(Bug(), RawloopError)


def test_close_ends_the_data_workers(tmp_path: Path) -> None:
    def collate(examples: list[int]) -> Batch:
        return Batch({"x": torch.ones(len(examples), 3)}, {}, {"y": len(examples)}, list(map(str, examples)))

    samples = [Sample(str(index), ()) for index in range(8)]
    loader = Loader(MicroBatches(samples, lambda sample: int(sample.id), collate), num_workers=1)
    run = run_of(tmp_path, windows=TrainWindows(loader, BatchPlan(8, 4)), loaders=[loader], steps=1)
    before = set(psutil.Process().children())
    train(run)
    (worker,) = set(psutil.Process().children()) - before
    run.close()
    assert not worker.is_running()
