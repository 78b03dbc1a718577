"""Which samples are in which micro-batch, a pure function of (seed, window), and the loaders that make the batches.

`data/buckets.py` has the plan for `train.max_frames`.

A *window* is the accumulation group of one optimizer step. Since its contents depend only on (seed, window), a resume
is O(1), and neither the number of workers nor the world size changes a window. The random numbers that a family draws
for an example depend only on (seed, epoch, index of the sample).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain, count
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils.data import Dataset

from rawloop.contracts import Batch, Sample
from rawloop.data.workers import Workers
from rawloop.errors import OutOfMemory, RawloopError, UserError, first_line, is_out_of_memory
from rawloop.inputs import outside_autocast
from rawloop.seed import SampleStreams, Seed, derive_seed


class Draw(NamedTuple):
    """A place in the data order: the index of a sample, and the epoch."""

    sample: int
    epoch: int


class Plan(Protocol):
    """Which samples a rank takes in each window, as a function of the seed. `num_samples` are those of an epoch."""

    @property
    def num_samples(self) -> int:
        """Number of samples in an epoch."""

    @property
    def accumulation(self) -> int:
        """Micro-batches of a rank in a window."""

    @property
    def window_size(self) -> float:
        """Samples per optimizer step over all ranks; a mean if steps have different numbers."""

    def windows(self, epochs: float) -> int:
        """Return the number of windows of `epochs` epochs, rounded up."""

    def micro_batches(self, window: int) -> list[list[Draw]]:
        """Return this rank's samples of one window, one list per micro-batch."""

    def facts(self) -> dict[str, str]:
        """Return what the plan depends on besides settings and samples; see `changes.Contents`."""


@dataclass(frozen=True)
class BatchPlan:
    """Which samples a rank takes in a window.

    Each epoch is a permutation of all samples. Window k is the k-th slice of `world_size * batch_size * accumulation`
    samples of the concatenated epochs. So no sample is dropped, and every window is full on every rank.
    """

    num_samples: int
    batch_size: int
    accumulation: int = 1
    world_size: int = 1
    rank: int = 0
    seed: int = 0
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.accumulation < 1:
            raise UserError(
                f"train.batch_size ({self.batch_size}) and train.accumulation ({self.accumulation}) must be 1 or more"
            )
        if self.num_samples < self.window_size:
            processes = "1 process" if self.world_size == 1 else f"{self.world_size} processes"
            raise UserError(
                f"one step takes {self.window_size} samples ({processes} x train.batch_size "
                f"{self.batch_size} x train.accumulation {self.accumulation}), the training set has "
                f"{self.num_samples}: lower one of them, or add data"
            )

    @property
    def window_size(self) -> int:
        """Samples per optimizer step over all ranks."""
        return self.world_size * self.batch_size * self.accumulation

    def windows(self, epochs: float) -> int:
        """Return the number of windows of `epochs` epochs. The last window is filled from the next epoch."""
        return max(1, math.ceil(round(epochs * self.num_samples / self.window_size, 9)))

    def micro_batches(self, window: int) -> list[list[Draw]]:
        """Return this rank's samples of one window, one list per micro-batch."""
        start = window * self.window_size
        stride = self.world_size * self.batch_size
        firsts = [start + micro * stride + self.rank * self.batch_size for micro in range(self.accumulation)]
        return [[self._sample(first + i) for i in range(self.batch_size)] for first in firsts]

    def facts(self) -> dict[str, str]:
        """Return nothing: this plan depends on the number of samples alone."""
        return {}

    def _sample(self, position: int) -> Draw:
        epoch, offset = divmod(position, self.num_samples)
        if not self.shuffle:
            return Draw(offset, epoch)
        return Draw(int(_permutation(self.num_samples, self.seed, epoch)[offset]), epoch)


@lru_cache(maxsize=2)
def _permutation(length: int, seed: int, epoch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(derive_seed("epoch", seed, epoch))
    return torch.randperm(length, generator=generator)


class MicroBatches(Dataset[Batch | RawloopError]):
    """Makes a micro-batch of some samples, in the main process or in a worker.

    Args:
        samples: the data set.
        example: encodes one sample. Its random numbers depend only on `seed`, epoch and index of the sample.
        collate: pads examples to a micro-batch. Its random numbers continue those of the last sample.
        fault: returns the fault of a micro-batch, or None; see `Limits.fault`.
        seed: of the run.
        pick: returns the sample at a place of the data order, if it depends on the epoch.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        example: Callable[[Sample], Any],
        collate: Callable[[list[Any]], Batch],
        fault: Callable[[Batch], str | None] = lambda batch: None,
        seed: int = 0,
        pick: Callable[[Draw], Sample] | None = None,
    ) -> None:
        self.samples, self.example, self.collate, self.fault = samples, example, collate, fault
        self.seed, self.streams, self.pick = seed, SampleStreams(), pick or self._given

    def __getitem__(self, draws: list[Draw]) -> Batch | RawloopError:
        """Return the micro-batch, or the error: torch would add a traceback to the message of an error in a worker."""
        try:
            return self.made(draws)[1]
        except RawloopError as error:
            return error
        except OSError as error:
            return RawloopError(f"the codes of the samples {self._names(draws)} cannot be read: {error}")
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return OutOfMemory(
                f"{first_line(error)} (while making a batch of the samples {self._names(draws)}): the machine's memory "
                "does not suffice: lower data.num_workers, or leave out the longest samples (data.max_seconds)"
            )

    def made(self, draws: list[Draw]) -> tuple[list[Any], Batch]:
        """Return the examples of some samples and their micro-batch. A UserError names a bad sample."""
        try:
            with outside_autocast():  # of the trial before step 0
                examples, batch = self.streams.lend(partial(self._make, draws))
            fault = self.fault(batch)
        except (RawloopError, OSError):
            raise
        except Exception as error:  # a bug in a family
            error.add_note(f"while making a batch of the samples {self._names(draws)}")
            raise
        if fault is not None:
            raise UserError(self._blame(draws, examples, fault))
        return examples, batch

    def _make(self, draws: list[Draw], seed: Seed | None) -> tuple[list[Any], Batch]:
        examples = []
        for draw in draws:
            if seed is not None:
                seed(derive_seed("sample", self.seed, draw.epoch, draw.sample))
            examples.append(self.example(self.pick(draw)))
        return examples, self.collate(examples)

    def _given(self, draw: Draw) -> Sample:
        return self.samples[draw.sample]

    def _blame(self, draws: list[Draw], examples: list[Any], fault: str) -> str:
        """Return a message that names the first sample with a fault when it is batched alone."""
        for draw, example in zip(draws, examples, strict=True):
            alone = self.fault(self.collate([example]))
            if alone is not None:
                sample = self.pick(draw)
                return f"sample '{sample.id}' ({sample.source}): {alone}"
        return f"the batch of the samples {self._names(draws)}: {fault}"

    def _names(self, draws: list[Draw]) -> str:
        return ", ".join(self.samples[draw.sample].id for draw in draws)


class Loader:
    """Makes micro-batches of given samples, in this process or in workers, which live until `close`.

    Give the training stream and the evaluation a loader each: with workers, a new iteration ends the previous one.
    """

    def __init__(self, batches: MicroBatches, num_workers: int = 0, pin_memory: bool = False) -> None:
        self.batches, self.pin_memory = batches, pin_memory
        self.workers = Workers(batches, num_workers, pin_memory) if num_workers else None

    def iterate(self, draws: Iterable[list[Draw]]) -> Iterator[Batch]:
        """Yield a micro-batch for each list of samples. A RawloopError names a bad sample, or a dead worker."""
        pin = self.pin_memory and self.workers is None
        for made in self.workers.iterate(draws) if self.workers else map(self.batches.__getitem__, draws):
            if isinstance(made, RawloopError):
                try:
                    raise made
                finally:
                    del made  # else its traceback keeps this frame alive, and the frame the workers
            yield made.pin_memory() if pin else made

    def close(self) -> None:
        """End the workers, if there are any."""
        if self.workers:
            self.workers.close()


class TrainWindows:
    """The training data: a call yields the windows (lists of micro-batches) from a number on."""

    def __init__(self, loader: Loader, plan: Plan) -> None:
        self.loader, self.plan = loader, plan

    def __call__(self, window: int) -> Iterator[list[Batch]]:
        """Yield this rank's windows from number `window` on, forever."""
        stream = self.loader.iterate(chain.from_iterable(map(self.plan.micro_batches, count(window))))
        while True:
            yield [next(stream) for _ in range(self.plan.accumulation)]


class EvalBatches:
    """One rank's share of the evaluation set, in a fixed order. Each sample is in exactly one share.

    Every evaluation is epoch 0, so its random numbers are the same each time. `groups` are the samples of each
    micro-batch, if it is not `batch_size` that decides.
    """

    def __init__(
        self,
        loader: Loader,
        num_samples: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        groups: Sequence[Sequence[int]] | None = None,
    ) -> None:
        if num_samples < 1:
            raise UserError("the evaluation set is empty: give data.eval samples, or set evaluation.enabled to false")
        self.loader = loader
        if groups is None:
            share = range(rank, num_samples, world_size)
            groups = [share[start : start + batch_size] for start in range(0, len(share), batch_size)]
        else:
            groups = groups[rank::world_size]
        self.draws = [[Draw(index, epoch=0) for index in group] for group in groups]

    def __len__(self) -> int:
        return len(self.draws)

    def __iter__(self) -> Iterator[Batch]:
        return self.loader.iterate(self.draws)
