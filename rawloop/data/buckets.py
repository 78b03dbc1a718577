"""Micro-batches by positions: samples of similar length together, as many as fit into `train.max_frames`.

Sums of rounded lengths do not depend on which of two samples with the same rounded length stands where. So every epoch
has the same number of micro-batches, whatever its order, and a window is found in it without the epochs before it.
"""

import hashlib
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from rawloop.data.batches import Draw
from rawloop.errors import UserError
from rawloop.seed import derive_seed

Array = np.ndarray[Any, np.dtype[np.int64]]
FACT = "train.max_frames"  # its name among the facts of a run
ROUNDING = 1.02  # lengths are rounded up to steps of 2%: more is padding, less leaves fewer samples to shuffle
# Micro-batches of a window differ by at most a tenth of max_frames. With finer classes ranks wait less (1.2% instead of
# 2.5% for eight of them), but lengths within a window are more alike: correlation 0.3 instead of 0.1.
CLASSES = 10


def cut(lengths: Array, most: int, packed: bool = False) -> list[int]:
    """Return where micro-batches start in descending lengths. Each takes as many samples as fit into `most` positions.

    A sample that is longer is alone. With `packed` the lengths of a micro-batch add up, else it is padded to its
    longest.
    """
    sums = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    starts, start = [], 0
    while start < len(lengths):
        starts.append(start)
        if packed:
            after = int(np.searchsorted(sums, sums[start] + most, side="right")) - 1
        else:
            after = start + most // int(lengths[start])
        start = max(after, start + 1)
    return starts


def rounded(lengths: Array, most: int) -> Array:
    """Return lengths rounded up to a grid from 1 to `most`."""
    grid = [1]
    while grid[-1] < most:
        grid.append(min(most, max(grid[-1] + 1, int(grid[-1] * ROUNDING))))
    steps = np.array(grid, dtype=np.int64)
    return steps[np.searchsorted(steps, lengths)]


@dataclass(frozen=True)
class Grouping:
    """The micro-batches of an epoch: `order` has the samples, `spans` (windows, micro-batches, 2) where each is in it.

    `positions` (windows, micro-batches) includes the padding, `padding` is its share.
    """

    order: Array
    spans: Array
    positions: Array
    padding: float


class FramePlan:
    """Which samples a rank takes in a window, by their lengths.

    An epoch has every sample once, and ends with a window. Its windows have `world_size * accumulation` micro-batches
    of nearly equal positions, in random order, which ranks share. So only the product decides which samples a window
    has. With `shuffle` off all epochs are alike.

    Args:
        lengths: (samples,) positions of each sample; one above `max_frames` is left out.
        max_frames: the most positions of a micro-batch, padding included.
        accumulation: micro-batches of a rank in a window.
        world_size: number of ranks.
        rank: this rank.
        seed: of the run.
        shuffle: group and order the samples anew in every epoch.
        packed: the family packs the samples of a micro-batch into one row.

    Raises:
        UserError: there are fewer samples than micro-batches in a window.
    """

    def __init__(
        self,
        lengths: Sequence[int] | Array,
        max_frames: int,
        *,
        accumulation: int = 1,
        world_size: int = 1,
        rank: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        packed: bool = False,
    ) -> None:
        self.lengths, self.max_frames, self.packed = np.asarray(lengths, dtype=np.int64), max_frames, packed
        self.accumulation, self.world_size, self.rank = accumulation, world_size, rank
        self.seed, self.shuffle, self.per_window = seed, shuffle, world_size * accumulation
        self._chosen = np.flatnonzero(self.lengths <= max_frames)
        self.num_samples = len(self._chosen)
        if self.num_samples < self.per_window:
            raise UserError(
                f"one step takes {self.per_window} micro-batches ({world_size} process(es) x train.accumulation "
                f"{accumulation}), the training set has {self.num_samples} samples: lower train.accumulation, or add "
                "data"
            )
        self._rounded = rounded(self.lengths[self._chosen], max_frames)
        self._sorted = np.sort(self._rounded)[::-1]
        fewest, size = len(cut(self._sorted, max_frames, packed)), self.per_window
        # One more than the fewest leaves room for the random place of `_starts`.
        wanted = [-(-count // size) * size for count in (fewest + 1, fewest)]
        self.num_batches = next((count for count in wanted if count <= self.num_samples), 0)
        if not self.num_batches:
            raise UserError(
                f"train.max_frames is {max_frames}, and nearly each of the {self.num_samples} samples fills a "
                f"micro-batch: {fewest} of them are no whole number of steps of {size}: raise it, or set it to 0 and "
                "train.batch_size to 1"
            )
        self._kept: tuple[int, Grouping] | None = None

    @property
    def windows_per_epoch(self) -> int:
        """Number of windows of each epoch."""
        return self.num_batches // self.per_window

    @property
    def window_size(self) -> float:
        """Samples per optimizer step over all ranks, on average."""
        return self.num_samples / self.windows_per_epoch

    def windows(self, epochs: float) -> int:
        """Return the number of windows of `epochs` epochs, rounded up."""
        return max(1, math.ceil(round(epochs * self.windows_per_epoch, 9)))

    def micro_batches(self, window: int) -> list[list[Draw]]:
        """Return this rank's samples of one window, one list per micro-batch."""
        epoch, place = divmod(window, self.windows_per_epoch)
        grouping = self.grouping(epoch)
        spans = grouping.spans[place, self.rank :: self.world_size].tolist()
        return [[Draw(sample, epoch) for sample in grouping.order[start:end].tolist()] for start, end in spans]

    def grouping(self, epoch: int) -> Grouping:
        """Return the micro-batches of an epoch, a function of seed and epoch. The last ones asked for are kept."""
        if self._kept is None or self._kept[0] != epoch:
            self._kept = epoch, self._group(epoch)
        return self._kept[1]

    def costliest(self) -> list[list[Draw]]:
        """Return the micro-batch of the first epoch with the most positions, and the one with the most samples."""
        grouping = self.grouping(0)
        spans = grouping.spans.reshape(-1, 2)
        largest, most = int(grouping.positions.argmax()), int((spans[:, 1] - spans[:, 0]).argmax())
        chosen = [grouping.order[slice(*spans[place])].tolist() for place in dict.fromkeys((largest, most))]
        return [[Draw(sample, 0) for sample in samples] for samples in chosen]

    def facts(self) -> dict[str, str]:
        """Return a digest of the lengths, which ranks and a resumed run must share."""
        digest = hashlib.sha256(self.lengths.astype("<i8").tobytes()).hexdigest()[:16]
        return {FACT: f"{self.lengths.sum():,} positions, digest {digest}"}

    def text(self) -> str:
        """Return a line about the micro-batches of the first epoch."""
        grouping = self.grouping(0)
        rows = grouping.spans[..., 1] - grouping.spans[..., 0]
        return (
            f"train.max_frames: {self.num_batches:,} micro-batches of {rows.min()} to {rows.max()} samples, "
            f"{self.windows_per_epoch:,} steps an epoch; {grouping.padding:.1%} of the positions are padding, a "
            f"micro-batch has {int(grouping.positions.mean()):,} on average and at most {grouping.positions.max():,}"
        )

    def _group(self, epoch: int) -> Grouping:
        seed = derive_seed("epoch", self.seed, epoch if self.shuffle else 0)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(self.num_samples, generator=generator).numpy()
        order = self._chosen[drawn[np.argsort(-self._rounded[drawn], kind="stable")]]
        spans = self._spans(generator)
        lengths, starts = self.lengths[order], spans[:, 0]
        add, longest = np.add.reduceat(lengths, starts), np.maximum.reduceat(lengths, starts)
        positions = add if self.packed else longest * (spans[:, 1] - spans[:, 0])
        # Neighbours in `ranked` have nearly equal positions. Their lengths differ: long ones in few rows.
        ties = torch.randperm(self.num_batches, generator=generator).numpy()
        ranked = np.lexsort((ties, positions * CLASSES // self.max_frames)).reshape(-1, self.per_window)
        ranked = ranked[torch.randperm(len(ranked), generator=generator).numpy()]
        padding = 1 - float(add.sum() / positions.sum())
        return Grouping(order, spans[ranked], positions[ranked], padding)

    def _spans(self, generator: torch.Generator) -> Array:
        """Return `num_batches` spans of the sorted samples, cut anew at a random place, so that neighbours change."""
        lengths, most = self._sorted, self.max_frames
        place = int(torch.randint(-(-self.num_samples // 4), (1,), generator=generator))
        starts = cut(lengths[:place], most, self.packed)
        starts += [place + start for start in cut(lengths[place:], most, self.packed)]
        if len(starts) > self.num_batches:  # at most one more than without that place
            starts = cut(lengths, most, self.packed)
        # The largest are split until their number is right.
        heap = [(start - end, start) for start, end in pairwise([*starts, self.num_samples])]
        heapq.heapify(heap)
        while len(heap) < self.num_batches:
            rows, start = heapq.heappop(heap)
            first = -rows // 2
            heapq.heappush(heap, (-first, start))
            heapq.heappush(heap, (rows + first, start + first))
        return np.array(sorted((start, start - rows) for rows, start in heap), dtype=np.int64)
