"""The data order is a pure function, complete, and the same for any world size and number of workers."""

import gc
import hashlib
import math
import random
import re
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import numpy
import pytest
import torch

from rawloop.contracts import Batch, Labels, Sample
from rawloop.data import workers
from rawloop.data.batches import BatchPlan, Draw, EvalBatches, Loader, MicroBatches, TrainWindows
from rawloop.data.limits import Limits
from rawloop.errors import OutOfMemory, RawloopError, UserError

SAMPLES = [Sample(str(i), ()) for i in range(23)]
CODES = torch.tensor([[4, -100, 0]])


def collate(examples: list[int]) -> Batch:
    return Batch({"x": torch.tensor(examples)}, {}, {"s": len(examples)}, [str(e) for e in examples])


def loader(workers: int = 0) -> Loader:
    return Loader(MicroBatches(SAMPLES, lambda sample: int(sample.id), collate), workers)


def window_ids(plan: BatchPlan, window: int) -> list[int]:
    return [draw.sample for micro in plan.micro_batches(window) for draw in micro]


def test_workers_are_forked_when_no_library_s_thread_is_running(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that computes without the GIL stands for a library's; it is unknown where it is not enumerated."""
    stop, ends = threading.Event(), []

    def compute() -> None:
        while not stop.is_set():
            hashlib.pbkdf2_hmac("sha256", b"x", b"y", 200_000)
        ends.append(time.monotonic())

    thread = threading.Thread(target=compute)
    thread.start()
    seen: set[int] = set()
    while thread.native_id not in seen:
        seen |= set(workers.running_threads({threading.get_native_id()}))
    assert thread.native_id not in workers.running_threads({thread.native_id})
    monkeypatch.setattr(threading, "enumerate", lambda: [threading.main_thread()])
    begun = time.monotonic()
    workers.wait_for_libraries_threads(limit=0.3)
    assert time.monotonic() - begun >= 0.3
    threading.Timer(0.1, stop.set).start()
    workers.wait_for_libraries_threads(limit=30)
    assert ends
    assert ends[0] <= time.monotonic()
    monkeypatch.undo()
    thread.join()


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
    straight = [[batch.ids for batch in window] for window in islice(windows(0), 9)]
    resumed = [[batch.ids for batch in window] for window in islice(windows(4), 5)]
    assert straight[4:] == resumed
    assert len(straight[0]) == 2


def test_loading_leaves_the_training_random_stream_alone() -> None:
    windows = TrainWindows(loader(), BatchPlan(23, 2))
    before = torch.get_rng_state()
    next(windows(0))
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
def test_full_memory_of_the_machine_is_one_line_with_the_samples(workers: int) -> None:
    def example(sample: Sample) -> int:
        if sample.id == "3":
            raise MemoryError
        return int(sample.id)

    full = Loader(MicroBatches(SAMPLES, example, collate), workers)
    said = r"^MemoryError \(while making a batch of the samples 2, 3\): .*: lower data\.num_workers, or leave out the "
    with pytest.raises(OutOfMemory, match=said):
        list(EvalBatches(full, 23, 2))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bug_says_in_which_samples_it_showed(workers: int) -> None:
    buggy = Loader(MicroBatches(SAMPLES, lambda sample: [0] * 7 if sample.id < "3" else [][0], collate), workers)
    said = ""
    try:
        list(buggy.iterate(iter([[Draw(2, 0), Draw(3, 0)]])))
    except IndexError as error:  # not pytest.raises, which would hold the frames, and they the worker
        said = "".join(traceback.format_exception(error))
    gc.collect()  # the frames of the error are a cycle, too, until then
    assert "while making a batch of the samples 2, 3" in said


def text(ids: list[list[int]], positions: list[int], targets: list[int], count: int | None = None) -> Batch:
    labels = Labels(torch.tensor(positions), torch.tensor(targets))
    return Batch({"input_ids": torch.tensor(ids)}, {"s": labels}, {"s": len(targets) if count is None else count}, [])


def features(value: float, name: str = "input_features") -> Batch:
    batch = text([[1, 2, 3]], [0], [2])
    return replace(batch, inputs={**batch.inputs, name: torch.tensor([[[0.0, value], [1.0, -1.0]]])})


def codes(*ids: int) -> Batch:
    """Two codebooks of some frames."""
    batch = text([[1, 2, 3]], [0], [2])
    return replace(batch, inputs={**batch.inputs, "audio_input_ids": torch.tensor(ids).view(1, -1, 2)})


def code_targets(*targets: int) -> Batch:
    batch = text([[1, 2, 3, 4]], [], [])
    count = sum(target != -100 for target in targets)
    labels = Labels(torch.tensor([0, 2])[: len(targets) // 2], torch.tensor(targets).view(-1, 2))
    return replace(batch, labels={"s": labels}, targets={"s": count})


LIMITS = Limits({"input_ids": 10, "audio_input_ids": 20}, {"s": 5})
WRONG = {
    r"^its 'input_ids' has the id 10 at position 1, and the model knows 0 to 9 there: use": text([[1, 10]], [0], [1]),
    r"^its 'input_ids' has the id -1 at position 0, and": text([[-1, 1]], [0], [1]),
    r"^its 'audio_input_ids' has the id 20 in codebook 1 at frame 2, and the model knows 0 to 19": codes(
        *range(15, 21)
    ),
    r"^its 'audio_input_ids' has the id -1 in codebook 0 at frame 1, and": codes(0, 1, -1, 2),
    r"^a target of the stream 's' at position 1 is 5, and the model has the classes 0 to 4: .*positions -100$": text(
        [[1]], [0], [5]
    ),
    r"^a target of the stream 's' at position 2 is -7, and": text([[1]], [0, 1], [1, -7]),
    r"^a target of the stream 's' of codebook 1 at position 3 is 7, and": code_targets(0, 4, -100, 7),
    r"^a target of the stream 's' is at the very first position": text([[1, 2]], [-1, 0], [1, 2]),
    r"^it counts 3 targets of the stream 's', and 1 of its labels are not -100": text([[1, 2]], [0, 1], [1, -100], 3),
    r"^it has no labels or no count of targets for the stream 's'": replace(text([[1]], [0], [1]), labels={}),
    r"^it has no labels or no count": replace(text([[1]], [0], [1]), targets={}),
    r"^its 'input_features' has numbers that are not finite: correct their source": features(math.nan),
    r"^its 'input_features' has numbers": features(-math.inf),
    r"^its 'attention_mask' has NaN or plus infinity: correct": features(math.nan, "attention_mask"),
    r"^its 'decoder_attention_mask' has NaN or plus": features(math.inf, "decoder_attention_mask"),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_a_model_cannot_take_is_found_in_the_batch(message: str) -> None:
    fault = LIMITS.fault(WRONG[message])
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
        features(-math.inf, "attention_mask"),
        features(torch.finfo(torch.float32).min, "attn_bias"),
        codes(0, 19),
        code_targets(0, -100, -100, 4),
        Batch({"frames": torch.tensor([[99]])}, {"s": Labels(torch.zeros(1, dtype=torch.int64), CODES)}, {"s": 2}, []),
    ],
)
def test_what_a_model_can_take_is_no_fault(batch: Batch) -> None:
    assert LIMITS.fault(batch) is None


def test_ids_are_let_pass_where_the_size_of_the_embedding_is_not_known() -> None:
    assert Limits({}, {"s": 5}).fault(text([[1, 999]], [0], [1])) is None


def test_a_fault_is_blamed_on_its_sample_whatever_the_batch_looks_like() -> None:
    def packed(examples: list[int]) -> Batch:
        return text([examples], list(range(len(examples))), [0] * len(examples))

    samples = [Sample(str(i), (), source=f"line {i}") for i in range(23)]
    batches = MicroBatches(samples, lambda sample: int(sample.id), packed, LIMITS.fault)
    assert isinstance(batches[[Draw(0, 0), Draw(9, 0)]], Batch)
    error = batches[[Draw(i, 0) for i in (3, 12, 13)]]
    assert isinstance(error, UserError)
    assert str(error).startswith("sample '12' (line 12): its 'input_ids' has the id 12")


def test_a_fault_that_no_sample_has_alone_is_told_with_all_of_them() -> None:
    def crowded(examples: list[int]) -> Batch:
        return text([[len(examples) * 4]], [0], [1])

    error = MicroBatches(SAMPLES, lambda sample: 0, crowded, LIMITS.fault)[[Draw(i, 0) for i in (3, 4, 5)]]
    assert str(error).startswith("the batch of the samples 3, 4, 5: its 'input_ids' has the id 12")


# -- what is drawn at random while a sample is made ----------------------------------------------------------------


def noisy(sample: Sample) -> tuple[int, list[float]]:
    """An example as an augmenting family makes it; an odd number of gaussians leaves one cached in each library."""
    return int(sample.id), [torch.randn(1).item(), random.gauss(0, 1), random.random(), float(numpy.random.randn())]


def collate_noisy(examples: list[tuple[int, list[float]]]) -> Batch:
    numbers = torch.tensor([values for _, values in examples], dtype=torch.float64)
    ids = [str(index) for index, _ in examples]
    return Batch({"x": numbers, "noise": torch.rand(2)}, {}, {"s": len(examples)}, ids)


def noisy_loader(workers: int = 0, seed: int = 3) -> Loader:
    return Loader(MicroBatches(SAMPLES, noisy, collate_noisy, seed=seed), workers)


def drawn(plans: list[BatchPlan], workers: int = 0, first: int = 0, last: int = 12) -> dict[Draw, list[float]]:
    """What every sample drew in some windows, all ranks together."""
    found: dict[Draw, list[float]] = {}
    for plan in plans:
        batches = chain.from_iterable(islice(TrainWindows(noisy_loader(workers), plan)(first), last - first))
        draws = chain.from_iterable(plan.micro_batches(window) for window in range(first, last))
        for batch, micro in zip(batches, draws, strict=True):
            assert batch.ids == [str(draw.sample) for draw in micro]
            found |= dict(zip(micro, batch.inputs["x"].tolist(), strict=True))
    return found


def test_what_is_drawn_depends_on_seed_epoch_and_sample_alone() -> None:
    straight = drawn([BatchPlan(23, 2, 2, seed=3)])
    assert {draw.epoch for draw in straight} == {0, 1, 2}
    assert len({tuple(values) for values in straight.values()}) == len(straight) == 48  # each epoch anew
    assert all(len({values[k] for values in straight.values()}) == 48 for k in range(4))  # in each library
    assert drawn([BatchPlan(23, 2, 2, seed=3)], workers=2) == straight
    assert drawn([BatchPlan(23, 1, 2, 2, rank, seed=3) for rank in range(2)]) == straight
    resumed = drawn([BatchPlan(23, 2, 2, seed=3)], workers=2, first=5)
    assert resumed == {draw: straight[draw] for draw in resumed}
    assert len(resumed) == 28
    batches = noisy_loader(seed=4).batches
    other = batches.made(list(straight))[0]
    assert all(a != b for (_, a), b in zip(other, straight.values(), strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_collator_draws_is_the_same_wherever_it_runs(workers: int) -> None:
    def noises(first: int, workers: int) -> list[list[float]]:
        windows = TrainWindows(noisy_loader(workers), BatchPlan(23, 2, seed=3))(first)
        return [batch.inputs["noise"].tolist() for (batch,) in islice(windows, 8 - first)]

    straight = noises(0, 0)
    assert noises(3, workers) == straight[3:]
    assert len({tuple(noise) for noise in straight}) == 8


def test_evaluation_draws_the_same_each_time_on_any_number_of_ranks() -> None:
    def values(shares: list[EvalBatches]) -> Iterator[tuple[str, tuple[float, ...]]]:
        for batch in chain.from_iterable(shares):
            yield from zip(batch.ids, map(tuple, batch.inputs["x"].tolist()), strict=True)

    whole = EvalBatches(noisy_loader(), 23, 4)
    first = dict(values([whole]))
    assert dict(values([whole])) == first
    assert dict(values([EvalBatches(noisy_loader(2), 23, 2, rank, 2) for rank in range(2)])) == first


@pytest.mark.parametrize("fails", [False, True])
def test_the_training_streams_do_not_notice_what_samples_draw(fails: bool) -> None:
    def example(sample: Sample) -> tuple[int, list[float]]:
        made = noisy(sample)
        if fails:
            raise UserError("bad")
        return made

    def own() -> tuple[float, ...]:
        return torch.randn(1).item(), random.gauss(0, 1), float(numpy.random.randn())

    torch.manual_seed(1), random.seed(1), numpy.random.seed(1)
    expected = [own() for _ in range(2)]
    torch.manual_seed(1), random.seed(1), numpy.random.seed(1)
    seen = [own()]
    batches = MicroBatches(SAMPLES, example, collate_noisy)
    assert isinstance(batches[[Draw(0, 0), Draw(1, 0)]], UserError if fails else Batch)
    assert [*seen, own()] == expected


LIBRARIES: dict[str, Callable[[], float]] = {
    "torch": lambda: torch.randn(1).item(),
    "python": lambda: random.random(),
    "python gauss": lambda: random.gauss(0, 1),
    "numpy": lambda: float(numpy.random.randn()),
    "numpy around": lambda: float(numpy.random.rand(624)[0]),
    "python around": lambda: float(sum(random.getrandbits(32) for _ in range(624))),
}


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("gaussians", [1, 2])
def test_a_family_that_begins_to_draw_late_is_noticed(library: str, gaussians: int) -> None:
    """Every fifth sample draws: the same numbers wherever a run begins, and training's streams stand still.

    Training draws some gaussians between two batches. Where their number is odd, a library keeps one for later.
    """

    def example(sample: Sample) -> float:
        return LIBRARIES[library]() if int(sample.id) % 5 == 4 else 0.0

    def train() -> list[float]:
        return [torch.rand(1).item(), random.gauss(0, 1), float(numpy.random.randn())]

    def run(first: int, batches: MicroBatches | None) -> tuple[list[float], list[list[float]]]:
        torch.manual_seed(1), random.seed(1), numpy.random.seed(1)
        drawn, own = [], []
        for index in range(first, 12):
            own += [train() for _ in range(gaussians)]
            drawn += batches.made([Draw(index, 0)])[0] if batches else []
        return drawn, own

    drawn, own = run(0, MicroBatches(SAMPLES, example, collate, seed=3))
    assert [bool(value) for value in drawn] == [index % 5 == 4 for index in range(12)]
    assert own == run(0, None)[1]
    for first in (4, 8):
        assert run(first, MicroBatches(SAMPLES, example, collate, seed=3))[0] == drawn[first:]


def test_nothing_is_seeded_for_a_family_that_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeding all streams and putting them back takes longer than making a small batch."""
    monkeypatch.setattr(random, "seed", None)
    monkeypatch.setattr(numpy.random, "seed", None)
    assert len(list(islice(TrainWindows(loader(), BatchPlan(23, 2))(0), 9))) == 9


def test_another_generator_of_numpy_is_seeded_and_put_back_too() -> None:
    streams: Any = numpy.random
    before = streams.get_bit_generator()
    streams.set_bit_generator(streams.PCG64(5))
    try:
        batches = MicroBatches(SAMPLES, lambda sample: float(numpy.random.rand()), collate)
        state = str(numpy.random.get_state(legacy=False))
        first, again = (batches.made([Draw(0, 0)])[0] for _ in range(2))
        assert first == again
        assert str(numpy.random.get_state(legacy=False)) == state
    finally:
        streams.set_bit_generator(before)
