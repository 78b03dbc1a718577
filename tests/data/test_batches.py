"""The data order is a pure function, complete, and the same for any world size and number of workers."""

from itertools import islice

import pytest
import torch

from rawloop.contracts import Batch, Sample
from rawloop.data.batches import BatchPlan, EvalBatches, Loader, MicroBatches, TrainWindows
from rawloop.errors import RawloopError, UserError

SAMPLES = [Sample(str(i), ()) for i in range(23)]


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
