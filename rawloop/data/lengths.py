"""How many positions of the model each sample takes, measured once before training."""

from collections.abc import Callable, Iterable, Sequence
from copy import copy
from functools import partial
from pathlib import Path

import numpy as np

from rawloop.contracts import Batch, Family, Sample
from rawloop.data.batches import Draw, MicroBatches
from rawloop.data.buckets import Array, cut
from rawloop.data.index import SampleIndex, size_of
from rawloop.data.references import References
from rawloop.errors import UserError
from rawloop.family_protocols import LengthFamily


class Lengths:
    """Measures samples: `lengths(index)` are the positions of a sample.

    If references are drawn, a sample is measured with the one that makes it longest, and `batches` has it so.

    Args:
        family: counts them, or else makes the example.
        batches: the samples, and how their examples are made.
        frames: the length of a clip.
    """

    def __init__(self, family: Family, batches: MicroBatches, frames: Callable[[Path], int]) -> None:
        self.family, self.batches, self.frames = family, batches, frames
        if isinstance(batches.pick, References):
            self.batches = copy(batches)
            self.batches.pick = partial(self._costliest, batches.pick)

    def __call__(self, index: int) -> int:
        """Return the positions of a sample."""
        if isinstance(self.family, LengthFamily):
            return self._length(self.batches.pick(Draw(index, epoch=0)))
        return shape_of(self.batches.made([Draw(index, epoch=0)])[1])[1]

    def _length(self, sample: Sample) -> int:
        if not isinstance(self.family, LengthFamily):
            return size_of(sample, self.frames)
        with sample.named_in_errors():
            return self.family.length(sample, self.frames)

    def _costliest(self, references: References, draw: Draw) -> Sample:
        return references.costliest(draw.sample, self._length)

    def of(self, indices: Iterable[int]) -> Array:
        """Return the positions of some samples, int64."""
        return np.fromiter(map(self, indices), dtype=np.int64)

    def longest(self, number: int) -> list[int]:
        """Return the longest samples. Only those with most frames and bytes are measured, without making examples."""
        samples = self.batches.samples
        size = samples.sizes if isinstance(samples, SampleIndex) else self._sizes(samples)
        ranked = np.argsort(-size, kind="stable")[: 4 * number + 12]
        if isinstance(self.family, LengthFamily):
            ranked = ranked[np.argsort(-self.of(ranked.tolist()), kind="stable")]
        return [int(index) for index in ranked[:number]]

    def _sizes(self, samples: Sequence[Sample]) -> Array:
        return np.fromiter((size_of(sample, self.frames) for sample in samples), dtype=np.int64, count=len(samples))


def shape_of(batch: Batch) -> tuple[int, int]:
    """Return the rows and positions of the model's ids, whatever their name."""
    named = (batch.inputs.get("input_ids"), *batch.inputs.values())
    shapes = (t.shape for t in named if t is not None and t.dim() == 2 and not t.is_floating_point())
    shape = next(shapes, None)
    if shape is None:
        raise UserError(
            "the model's inputs have no ids (batch, positions), so the lengths of samples are not known: give the "
            "family a method `length`, or set train.max_frames to 0"
        )
    return shape[0], shape[1]


def groups_of(lengths: Array, most: int, packed: bool) -> Sequence[Sequence[int]]:
    """Return the samples of each micro-batch, longest first; a sample longer than `most` is alone."""
    order = np.argsort(-lengths, kind="stable")
    starts = cut(lengths[order], most, packed)
    return [group.tolist() for group in np.split(order, starts[1:])]
