"""The data order is a pure function, complete, and the same for any world size and number of workers."""

import math
import re
import traceback
from dataclasses import replace
from itertools import islice

import pytest
import torch

from rawloop.contracts import Batch, Labels, Sample
from rawloop.data.batches import BatchPlan, EvalBatches, Loader, MicroBatches, TrainWindows
from rawloop.data.limits import Limits
from rawloop.errors import RawloopError, UserError

SAMPLES = [Sample(str(i), ()) for i in range(23)]
CODES = torch.tensor([[4, -100, 0]])


def collate(examples: list[int]) -> Batch:
    return Batch({"x": torch.tensor(examples)}, {}, {"s": len(examples)}, [str(e) for e in examples])


def loader(workers: int = 0) -> Loader:
    return Loader(MicroBatches(SAMPLES, lambda sample: int(sample.id), collate), workers)


def window_ids(plan: BatchPlan, window: int) -> list[int]:
    return [index for micro in plan.micro_batches(window) for index in micro]


def test_every_epoch_sees_every_sample_once() -> None:
    plan = BatchPlan(23, batch_size=2, accumulation=3, seed=5)
    stream = [index for window in range(23) for index in window_ids(plan, window)]
    for epoch in range(6):
        assert sorted(stream[epoch * 23 : (epoch + 1) * 23]) == list(range(23))
    assert stream[:23] != stream[23:46] != sorted(stream[23:46])


@pytest.mark.parametrize(("worlds", "sizes"), [((1, 2), (4, 2)), ((4, 2), (1, 2))])
def test_world_size_does_not_change_what_a_step_sees(worlds: tuple[int, int], sizes: tuple[int, int]) -> None:
    for window in range(10):
        seen = []
        for world, size in zip(worlds, sizes, strict=True):
            plans = [BatchPlan(23, size, accumulation=2, world_size=world, rank=rank, seed=1) for rank in range(world)]
            seen.append(sorted(i for plan in plans for i in window_ids(plan, window)))
        assert seen[0] == seen[1]


def test_windows_of_an_epoch_are_rounded_up() -> None:
    assert BatchPlan(23, 2, 2).windows(1) == 6  # 5.75
    assert BatchPlan(24, 2, 2).windows(2) == 12
    assert BatchPlan(24, 2, 2).windows(0.01) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_starts_at_any_window(workers: int) -> None:
    plan = BatchPlan(23, batch_size=2, accumulation=2, seed=3)
    windows = TrainWindows(loader(workers), plan)
    straight = [[batch.ids for batch in window] for window in islice(windows.start(0), 9)]
    resumed = [[batch.ids for batch in window] for window in islice(windows.start(4), 5)]
    assert straight[4:] == resumed
    assert len(straight[0]) == 2


def test_loading_leaves_the_training_random_stream_alone() -> None:
    windows = TrainWindows(loader(), BatchPlan(23, 2))
    before = torch.get_rng_state()
    next(windows.start(0))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("world", [1, 2, 3, 30])
def test_evaluation_shares_hold_every_sample_exactly_once(world: int) -> None:
    shares = [EvalBatches(loader(), 23, 4, rank=rank, world_size=world) for rank in range(world)]
    seen = sorted(int(name) for share in shares for batch in share for name in batch.ids)
    assert seen == list(range(23))
    again = sorted(int(name) for share in shares for batch in share for name in batch.ids)
    assert again == seen


def test_a_window_larger_than_the_data_is_refused() -> None:
    with pytest.raises(UserError, match=r"one step takes 24 samples \(2 processes x train.batch_size 4 x .* 3\).* 23"):
        BatchPlan(23, 4, 3, world_size=2)
    with pytest.raises(UserError, match="evaluation set is empty"):
        EvalBatches(loader(), 0, 4)
    with pytest.raises(UserError, match="must be 1 or more"):
        BatchPlan(23, 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_sample_arrives_as_its_own_error(workers: int) -> None:
    def example(sample: Sample) -> int:
        if sample.id == "3":
            raise UserError("sample '3' is bad")
        return int(sample.id)

    bad = Loader(MicroBatches(SAMPLES, example, collate), workers)
    with pytest.raises(RawloopError, match=r"^sample '3' is bad$"):
        list(EvalBatches(bad, 23, 2))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bug_says_in_which_samples_it_showed(workers: int) -> None:
    buggy = Loader(MicroBatches(SAMPLES, lambda sample: [0] * 7 if sample.id < "3" else [][0], collate), workers)
    said = ""
    try:
        list(buggy.iterate(iter([[2, 3]])))
    except IndexError as error:  # not pytest.raises, which would hold the frames, and they the worker
        said = "".join(traceback.format_exception(error))
    assert "while making a batch of the samples 2, 3" in said


def text(ids: list[list[int]], positions: list[int], targets: list[int], count: int | None = None) -> Batch:
    labels = Labels(torch.tensor(positions), torch.tensor(targets))
    return Batch({"input_ids": torch.tensor(ids)}, {"s": labels}, {"s": len(targets) if count is None else count}, [])


def features(value: float) -> Batch:
    batch = text([[1, 2, 3]], [0], [2])
    return replace(batch, inputs={**batch.inputs, "input_features": torch.tensor([[[0.0, value], [1.0, -1.0]]])})


WRONG = {
    r"^its 'input_ids' has the token 10, and the model's embedding knows 0 to 9: use": text([[1, 10]], [0], [1]),
    r"^its 'input_ids' has the token -1, and": text([[1, -1]], [0], [1]),
    r"^a target of the stream 's' is 5, and the model can say 0 to 4: use .*no target is -100$": text([[1]], [0], [5]),
    r"^a target of the stream 's' is -7, and": text([[1]], [0, 0], [1, -7]),
    r"^a target of the stream 's' is the first of all: nothing stands before it": text([[1, 2]], [-1, 0], [1, 2]),
    r"^it counts 3 targets of the stream 's', and 1 of its labels are not -100": text([[1, 2]], [0, 1], [1, -100], 3),
    r"^it has no labels or no count of targets for the stream 's'": replace(text([[1]], [0], [1]), labels={}),
    r"^it has no labels or no count": replace(text([[1]], [0], [1]), targets={}),
    r"^its 'input_features' has numbers that are not finite: mend what they": features(math.nan),
    r"^its 'input_features' has numbers": features(-math.inf),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_a_model_cannot_take_is_found_in_the_batch(message: str) -> None:
    fault = Limits(10, {"s": 5}).fault(WRONG[message])
    assert fault is not None
    assert re.search(message, fault), fault


@pytest.mark.parametrize(
    "batch",
    [
        text([[9, 0]], [0], [4]),
        text([[1, 2]], [], []),
        replace(text([[1]], [0], [1]), inputs={}),
        replace(text([[1]], [], []), inputs={"input_features": torch.zeros(0, 3)}),
        features(1e38),
        Batch({"frames": torch.tensor([[99]])}, {"s": Labels(torch.zeros(1, dtype=torch.int64), CODES)}, {"s": 2}, []),
    ],
)
def test_what_a_model_can_take_is_no_fault(batch: Batch) -> None:
    assert Limits(10, {"s": 5}).fault(batch) is None


def test_ids_are_let_pass_where_the_size_of_the_embedding_is_not_known() -> None:
    assert Limits(None, {"s": 5}).fault(text([[1, 999]], [0], [1])) is None


def test_a_fault_is_blamed_on_its_sample_whatever_the_batch_looks_like() -> None:
    def packed(examples: list[int]) -> Batch:
        return text([examples], list(range(len(examples))), [0] * len(examples))

    samples = [Sample(str(i), (), source=f"line {i}") for i in range(23)]
    batches = MicroBatches(samples, lambda sample: int(sample.id), packed, Limits(10, {"s": 5}).fault)
    assert isinstance(batches[[0, 9]], Batch)
    error = batches[[3, 12, 13]]
    assert isinstance(error, UserError)
    assert str(error).startswith("sample '12' (line 12): its 'input_ids' has the token 12")


def test_a_fault_that_no_sample_has_alone_is_told_with_all_of_them() -> None:
    def crowded(examples: list[int]) -> Batch:
        return text([[len(examples) * 4]], [0], [1])

    error = MicroBatches(SAMPLES, lambda sample: 0, crowded, Limits(10, {"s": 5}).fault)[[3, 4, 5]]
    assert str(error).startswith("the batch of the samples 3, 4, 5: its 'input_ids' has the token 12")
