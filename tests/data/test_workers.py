"""Data workers: batches that travel without file descriptors, and workers that are killed or cannot be started."""

import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from rawloop.build import check_run
from rawloop.config import RunConfig
from rawloop.contracts import Batch, Labels, Sample
from rawloop.data import DataConfig
from rawloop.data.batches import Draw, EvalBatches, Loader, MicroBatches
from rawloop.data.workers import PER_WORKER, SPARE, Packed
from rawloop.dist import World
from rawloop.errors import RawloopError, UserError
from rawloop.families import ModelConfig

SAMPLES = [Sample(f"innocent-{i}", ()) for i in range(64)]


def collate(examples: list[int]) -> Batch:
    values = torch.tensor(examples)
    return Batch({f"x{k}": values for k in range(8)}, {"s": Labels(values, values)}, {"s": 1}, list(map(str, examples)))


def loader(workers: int, example: Callable[[Sample], int] = lambda sample: int(sample.id[9:])) -> Loader:
    return Loader(MicroBatches(SAMPLES, example, collate), workers)


@pytest.fixture
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch look every 0.2 s, not 5, whether a worker whose batch does not come is alive."""
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))


def draws(count: int) -> list[list[Draw]]:
    return [[Draw(index, 0)] for index in range(count)]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12).view(3, 4).t(),
        torch.tensor([[0.5, -1.25], [float("inf"), 3e-5]], dtype=torch.bfloat16),
        torch.tensor([True, False]),
        torch.tensor(3.5),
        torch.empty(0, 8, dtype=torch.int64),
    ],
    ids=str,
)
def test_a_batch_is_the_same_after_its_way(tensor: torch.Tensor) -> None:
    whole = Packed(Batch({"a": tensor}, {"s": Labels(tensor, tensor)}, {"s": 2}, ["id"])).batch()
    for other in (whole.inputs["a"], *whole.labels["s"]):
        assert torch.equal(other, tensor)
        assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape)
    assert (whole.targets, whole.ids) == ({"s": 2}, ["id"])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_close_ends_the_workers_though_an_iteration_is_kept() -> None:
    made, before = loader(2), set(psutil.Process().children())
    kept = made.iterate(iter(draws(64)))
    assert next(kept).ids == ["0"]
    workers = set(psutil.Process().children()) - before
    assert len(workers) == 2
    made.close()
    assert not [worker for worker in workers if worker.is_running()]
    with pytest.raises(RawloopError, match="now make other batches"):
        next(kept)
    assert [batch.ids for batch in made.iterate(iter(draws(3)))] == [["0"], ["1"], ["2"]]  # with workers of its own
    made.close()
    made.close()


def test_workers_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(*given: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("torch.utils.data.dataloader._MultiProcessingDataLoaderIter", no_thread)
    with pytest.raises(
        RawloopError, match=r"^data\.num_workers is 2, which cannot be started: can't start new thread$"
    ):
        next(loader(2).iterate(draws(3)))


def in_a_process(run: Callable[[], None]) -> None:
    """Run in a process of its own, since limits that were lowered stay so."""
    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    assert process.exitcode == 0


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_few_file_descriptors_are_enough_for_batches_that_are_kept() -> None:
    """Each batch has 10 tensors: by descriptors into shared memory 64 of them would need 640."""

    def run() -> None:
        limit = len(os.listdir("/proc/self/fd")) + 3 * PER_WORKER
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        kept = list(loader(2).iterate(iter(draws(64))))
        assert [batch.ids for batch in kept] == [[str(index)] for index in range(64)]
        assert [int(batch.inputs["x7"]) for batch in kept] == list(range(64))

    in_a_process(run)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_too_few_file_descriptors_are_one_line() -> None:
    def run() -> None:
        limit = len(os.listdir("/proc/self/fd")) + PER_WORKER
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        with pytest.raises(UserError, match=rf"^2 data workers need about \d+ open .* may have {limit}: "):
            next(loader(2).iterate(iter(draws(2))))

    in_a_process(run)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_run_counts_the_workers_of_its_evaluations_at_the_start(demo_checkpoint: Path, demo_data: Path) -> None:
    """They are started at the first evaluation, which after a resume may be the last one."""

    def run() -> None:
        limit = len(os.listdir("/proc/self/fd")) + 2 * PER_WORKER + SPARE
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        data = DataConfig(str(demo_data / "train"), str(demo_data / "eval"), str(demo_data / "codes"), num_workers=2)
        config = RunConfig(device="cpu", model=ModelConfig(path=str(demo_checkpoint / "model")), data=data)
        with pytest.raises(UserError, match=rf"^4 data workers need about \d+ open .* may have {limit}: allow it more"):
            check_run(config, World())

    in_a_process(run)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_soft_limit_is_raised() -> None:
    def run() -> None:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 4, hard))
        assert len(list(loader(2).iterate(iter(draws(8))))) == 8

    in_a_process(run)


@pytest.mark.usefixtures("looks_often")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_worker_blames_no_sample(number: signal.Signals) -> None:
    parent, before = os.getpid(), signal.getsignal(signal.SIGCHLD)

    def example(sample: Sample) -> int:
        if sample is SAMPLES[5] and os.getpid() != parent:
            os.kill(os.getpid(), number)
        return int(sample.id[9:])

    stream = loader(1, example).iterate(iter(draws(8)))
    assert [next(stream).ids for _ in range(3)] == [["0"], ["1"], ["2"]]
    with pytest.raises(RawloopError, match=rf"^a data worker \(process \d+\) was killed by {number.name}") as caught:
        list(stream)
    assert "innocent" not in str(caught.value)
    assert signal.getsignal(signal.SIGCHLD) == before


@pytest.mark.usefixtures("looks_often")
def test_a_worker_s_end_is_not_raised_in_the_middle_of_a_step() -> None:
    """torch's own handler would raise it wherever the main thread stands, in a step of other samples."""
    stream = loader(1).iterate(iter(draws(64)))
    next(stream)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    worker.join()
    for _ in range(100):  # the step
        torch.ones(10).sum()
    with pytest.raises(RawloopError, match=r"was killed by SIGKILL: the system does that when memory runs out"):
        list(stream)


def pid_of_maker(sample: Sample) -> int:
    return os.getpid()


def test_workers_live_as_long_as_their_loader() -> None:
    """Forked at each evaluation they would be forked beside more and more threads, and late in a run."""
    both = loader(2, pid_of_maker)
    evaluations = EvalBatches(both, 16, 2)
    first, again = ({pid for batch in evaluations for pid in batch.inputs["x0"].tolist()} for _ in range(2))
    assert len(first) == 2
    assert first == again
    half = iter(evaluations)
    next(half)  # and is left
    assert {pid for batch in evaluations for pid in batch.inputs["x0"].tolist()} == first
    del both, evaluations, half
    deadline = time.monotonic() + 5
    while any(map(psutil.pid_exists, first)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(psutil.pid_exists, first))


def test_the_order_of_a_later_iteration_is_that_of_a_first() -> None:
    both = loader(2)
    orders = [[batch.ids for batch in both.iterate(draws(count))] for count in (9, 30, 9)]
    assert orders == [[[str(index)] for index in range(count)] for count in (9, 30, 9)]


def test_a_stream_whose_workers_make_other_batches_by_now_is_refused() -> None:
    """It would go on with the batches of the evaluation."""
    both = loader(2)
    stream = both.iterate(draws(20))
    next(stream)
    assert len(list(both.iterate(draws(4)))) == 4
    with pytest.raises(RawloopError, match="the data workers now make other batches: give each use its own Loader"):
        next(stream)


@pytest.mark.usefixtures("looks_often")
def test_a_worker_that_was_killed_while_it_waited_is_named() -> None:
    """Between two evaluations."""
    both = loader(1)
    assert len(list(both.iterate(draws(3)))) == 3
    (worker,) = multiprocessing.active_children()
    worker.kill()
    worker.join()
    with pytest.raises(RawloopError, match=r"^a data worker \(process \d+\) was killed by SIGKILL"):
        list(both.iterate(draws(3)))


def test_the_number_of_workers_is_bounded(tmp_path: Path) -> None:
    cores = os.cpu_count() or 1
    with pytest.raises(UserError, match=rf"is 100000: it must lie between 0 and \d+, .* has {cores} cores"):
        DataConfig(num_workers=100_000)
    DataConfig(num_workers=64)
