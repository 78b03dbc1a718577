"""Micro-batches by positions: every sample once an epoch, little padding, equal work, unpredictable lengths."""

from collections import Counter
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from rawloop.contracts import Batch, Sample
from rawloop.data.batches import Draw, EvalBatches, Loader, MicroBatches, TrainWindows
from rawloop.data.buckets import FramePlan, cut
from rawloop.data.lengths import groups_of
from rawloop.errors import UserError

MOST = 8192
SHAPES = [(1, 1), (2, 3), (8, 1), (1, 6)]


def speech(number: int = 20_000, seed: int = 0) -> Any:
    """Log-normal lengths around 300, as those of published speech sets: half of them between 200 and 450."""
    drawn = np.random.default_rng(seed).lognormal(np.log(300), 0.6, number)
    return np.clip(drawn, 10, MOST).astype(np.int64)


def plans(lengths: Any, world: int, accumulation: int, most: int = MOST, **keys: Any) -> list[FramePlan]:
    return [
        FramePlan(lengths, most, accumulation=accumulation, world_size=world, rank=rank, **keys)
        for rank in range(world)
    ]


def positions(samples: list[Draw], lengths: Any, packed: bool = False) -> int:
    own = lengths[[draw.sample for draw in samples]]
    return int(own.sum() if packed else len(own) * own.max())


@pytest.mark.parametrize(("world", "accumulation"), SHAPES)
@pytest.mark.parametrize("packed", [False, True])
def test_every_epoch_has_every_sample_once_and_ends_with_a_window(world: int, accumulation: int, packed: bool) -> None:
    lengths = speech(3001)
    ranks = plans(lengths, world, accumulation, 4096, seed=3, packed=packed)
    windows = ranks[0].windows_per_epoch
    assert ranks[0].windows(1) == windows
    assert ranks[0].windows(2.5) == -(-5 * windows // 2)
    for epoch in (0, 1, 7):
        taken = [p.micro_batches(w) for w in range(epoch * windows, (epoch + 1) * windows) for p in ranks]
        assert {len(micro_batches) for micro_batches in taken} == {accumulation}
        batches = [samples for micro_batches in taken for samples in micro_batches]
        assert Counter(draw for samples in batches for draw in samples) == Counter(Draw(k, epoch) for k in range(3001))
        assert max(positions(samples, lengths, packed) for samples in batches) <= 4096


def test_any_lengths_and_shapes_are_covered_or_refused() -> None:
    random, planned, refused = np.random.default_rng(1), 0, 0
    for _ in range(400):
        number, most, size = int(random.integers(1, 60)), int(random.integers(1, 50)), int(random.integers(1, 9))
        lengths = random.integers(1, most + 1, number)
        try:
            plan = FramePlan(lengths, most, accumulation=size, seed=1, packed=bool(random.integers(2)))
        except UserError:
            fewest = len(cut(np.sort(lengths)[::-1], most))
            refused += number < -(-fewest // size) * size or 2 * size > number
            continue
        planned += 1
        for epoch in range(3):
            windows = range(epoch * plan.windows_per_epoch, (epoch + 1) * plan.windows_per_epoch)
            batches = [samples for window in windows for samples in plan.micro_batches(window)]
            assert sorted(draw.sample for samples in batches for draw in samples) == list(range(number))
            assert all(0 < positions(samples, lengths, plan.packed) <= most for samples in batches)
    assert planned > 250
    assert planned + refused == 400


def test_a_window_depends_on_seed_and_number_alone() -> None:
    lengths = speech(2000)
    plan = FramePlan(lengths, MOST, accumulation=2, seed=3)
    later = [plan.micro_batches(window) for window in range(60, 70)]
    fresh = FramePlan(lengths, MOST, accumulation=2, seed=3)
    assert [fresh.micro_batches(window) for window in range(60, 70)] == later  # epochs 1 and 2
    other = FramePlan(lengths, MOST, accumulation=2, seed=4)
    assert [other.micro_batches(window) for window in range(60, 70)] != later
    alike = FramePlan(lengths, MOST, accumulation=2, seed=3, shuffle=False)
    first, second = (
        [[d.sample for d in m] for w in range(alike.windows_per_epoch) for m in alike.micro_batches(w + start)]
        for start in (0, alike.windows_per_epoch)
    )
    assert first == second


def test_only_the_product_of_ranks_and_accumulation_decides() -> None:
    lengths = speech(2000)
    for window in (0, 5, 40):
        seen = [
            sorted(sorted(m) for plan in plans(lengths, world, 4 // world, seed=2) for m in plan.micro_batches(window))
            for world in (1, 2, 4)
        ]
        assert seen[0] == seen[1] == seen[2]


def test_at_most_3_percent_is_padding() -> None:
    for epoch in (0, 1, 2):
        assert FramePlan(speech(), MOST, accumulation=4).grouping(epoch).padding < 0.02
    # Of few samples a micro-batch of 13 spans 3%.
    assert np.mean([FramePlan(speech(500, seed), MOST // 2).grouping(0).padding for seed in range(5)]) < 0.03
    packed = FramePlan(speech(), MOST, packed=True).grouping(0)
    assert packed.padding == 0
    assert packed.positions.mean() > 0.95 * MOST


@pytest.mark.parametrize(("world", "accumulation"), [(2, 1), (8, 1), (2, 4)])
def test_ranks_have_nearly_equal_work(world: int, accumulation: int) -> None:
    plan = FramePlan(speech(), MOST, accumulation=accumulation, world_size=world)
    work = plan.grouping(1).positions.reshape(-1, accumulation, world).sum(1)
    assert 1 - work.mean(1).sum() / work.max(1).sum() < 0.03  # what ranks wait for the slowest of a step
    assert np.ptp(work.sum(0)) / work.sum(0).mean() < 0.02


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (1, 4), (2, 2), (8, 1)])
def test_lengths_do_not_foretell_those_of_the_next_batch(world: int, accumulation: int) -> None:
    lengths = speech()
    found = []
    for seed in range(3):
        plan = FramePlan(lengths, MOST, accumulation=accumulation, world_size=world, seed=seed)
        batches = [m for window in range(plan.windows_per_epoch) for m in plan.micro_batches(window)]
        logs = np.log([lengths[[draw.sample for draw in samples]].max() for samples in batches])
        found.append(np.corrcoef(logs[:-1], logs[1:])[0, 1])
    assert abs(np.mean(found)) < 0.2, found


def test_long_samples_come_anywhere_in_an_epoch() -> None:
    lengths, places = speech(), []
    for seed in range(20):
        plan = FramePlan(lengths, MOST, seed=seed)
        batches = [m for window in range(plan.windows_per_epoch) for m in plan.micro_batches(window)]
        longest = np.array([lengths[[draw.sample for draw in samples]].max() for samples in batches])
        places.append(np.argsort(-longest)[:40].mean() / len(batches))
    assert abs(np.mean(places) - 0.5) < 0.05


@pytest.mark.parametrize(("number", "most"), [(20_000, 0.25), (500, 0.75)])
def test_epochs_put_other_samples_together(number: int, most: float) -> None:
    plan = FramePlan(speech(number), MOST // 2)

    def pairs(epoch: int) -> set[tuple[int, ...]]:
        grouping = plan.grouping(epoch)
        members = (sorted(grouping.order[start:end].tolist()) for start, end in grouping.spans.reshape(-1, 2))
        return {pair for one in members for pair in combinations(one, 2)}

    first, second = pairs(0), pairs(1)
    assert len(first & second) / len(first) < most


def test_the_costliest_micro_batches_are_those_of_most_positions_and_most_samples() -> None:
    lengths = speech(3000)
    plan = FramePlan(lengths, MOST)
    all_of_them = [m for window in range(plan.windows_per_epoch) for m in plan.micro_batches(window)]
    largest, most = plan.costliest()
    assert positions(largest, lengths) == max(positions(m, lengths) for m in all_of_them) > 0.99 * MOST
    assert len(most) == max(map(len, all_of_them))


def test_what_cannot_be_planned_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"one step takes 8 micro-batches \(2 process\(es\) x train.accumulation 4\).* 7"
    ):
        FramePlan([5] * 7, 100, accumulation=4, world_size=2)
    with pytest.raises(
        UserError, match=r"max_frames is 9, .* 5 samples fills .* 5 of them .*steps of 4: .*batch_size to 1"
    ):
        FramePlan([5] * 5, 9, accumulation=4)
    left_out = FramePlan([5, 101, 5, 5], 100)
    assert left_out.num_samples == 3
    assert {draw.sample for window in range(9) for m in left_out.micro_batches(window) for draw in m} == {0, 2, 3}


def test_a_longer_sample_is_evaluated_alone() -> None:
    lengths = np.array([30, 120, 40, 35, 90, 10])
    groups = groups_of(lengths, 100, packed=False)
    assert groups == [[1], [4], [2, 3], [0, 5]]
    assert cut(np.array([60, 50, 40, 10, 10]), 100, packed=True) == [0, 1, 4]
    samples = [Sample(str(index), ()) for index in range(6)]
    loader = Loader(MicroBatches(samples, lambda sample: sample.id, lambda ids: Batch({}, {}, {}, ids)))
    shares = [EvalBatches(loader, 6, 4, rank, 3, groups) for rank in range(3)]
    assert sorted(name for share in shares for batch in share for name in batch.ids) == list("012345")
    assert [len(list(share)) for share in shares] == [2, 1, 1]


@pytest.mark.parametrize("workers", [0, 1])
def test_windows_of_other_sizes_come_out_of_the_loader(workers: int) -> None:
    lengths = speech(300)
    samples = [Sample(str(index), ()) for index in range(300)]
    loader = Loader(MicroBatches(samples, lambda sample: sample.id, lambda ids: Batch({}, {}, {}, ids)), workers)
    plan = FramePlan(lengths, 2000, accumulation=2, world_size=2, rank=1)
    try:
        made = TrainWindows(loader, plan)(3)
        for window in (3, 4, 5):
            expected = [[str(draw.sample) for draw in samples] for samples in plan.micro_batches(window)]
            assert [batch.ids for batch in next(iter(made))] == expected
    finally:
        loader.close()
