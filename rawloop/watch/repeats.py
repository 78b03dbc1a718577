"""Batches that come again: a loader that stands still, or ranks that get the same data."""

import weakref
from collections.abc import Iterator

from torch import Tensor

from rawloop.contracts import Batch
from rawloop.watch.entries import Look, micro_batches
from rawloop.watch.findings import Finding, Place
from rawloop.watch.subject import Detector, StepRecord, Subject

TIMES = 5  # equal batches in a row, before it is told
SAMPLED = 24  # values of the first tensor that are compared: reading them takes microseconds


class Repeats:
    """Compares each batch with the last one."""

    def __init__(self) -> None:
        self._extremes: tuple[tuple[float, float], ...] = ()
        self._digest: int | None = None
        self._tensors: list[weakref.ref[Tensor]] = []
        self._since = self._same = 0

    def find(self, look: Look) -> Iterator[Finding]:
        """Find batches that come again. A loop that passes the very same tensors means to."""
        extremes = _extremes(look)
        meant = all(old() is entry.tensor for old, entry in zip(self._tensors, look.entries))
        again = extremes == self._extremes and not meant
        digest = _digest(look) if again else None  # it takes longer
        if digest is None or self._digest not in (None, digest):
            self._same, self._since = 0, look.record.step
        self._extremes, self._digest = extremes, digest
        self._tensors = [weakref.ref(entry.tensor) for entry in look.entries]
        self._same += 1
        if self._same == TIMES:
            what = f"the same batch came {TIMES} times in a row: the loader stands still"
            advice = "draw the next batch in each step; next(iter(loader)) starts the loader again each time"
            finding = look.finding("batch_repeated", what, _place(look), {"times": TIMES}, advice)
            finding.since = self._since
            yield finding


class RankBatches(Detector):
    """Compares batches over the ranks, when `WatchConfig.is_due`. All ranks call `batch` equally often.

    Nothing in it can fail on one rank alone, because the others would wait for that rank: an error is raised on all.
    """

    def __init__(self) -> None:
        self._calls = 0

    def batch(self, subject: Subject, record: StepRecord) -> Iterator[Finding]:
        """Look at a batch, on all ranks together."""
        world, due = subject.world, subject.config.is_due(self._calls)
        self._calls += 1
        ours = any(isinstance(part, Batch) for part in micro_batches(record.batch))
        if world.size == 1 or not due or ours:  # rawloop's own batches are different by construction
            return
        digests = world.gather(world.on_all_ranks(lambda: _digest(Look(subject, record, record.probing))))
        if len(set(digests)) == 1 and digests[0] is not None:
            look = Look(subject, record, full=False)
            what = f"all {world.size} ranks train on the same batch: their loaders are alike"
            advice = "give each rank its own share: a DistributedSampler, or a seed that depends on the rank"
            yield look.finding("ranks_same_batch", what, _place(look), {"ranks": world.size}, advice)


def _place(look: Look) -> Place:
    return Place("data", tensor=next((entry.path for entry in look.entries), ""))


def _extremes(look: Look) -> tuple[tuple[float, float], ...]:
    return tuple(look.extremes(entry) for entry in look.entries if look.may_read(entry))


def _digest(look: Look) -> int | None:
    """Return a digest of the first tensor on the host and the extremes of all; None if each tensor is constant."""
    tensors = [e.tensor for e in look.entries if e.kind != "mask" and (look.full or e.tensor.is_cpu)]
    if not tensors:
        return None
    values, extremes = tensors[0].detach().flatten(), _extremes(look)
    spread = values[:: max(1, values.numel() // SAMPLED)].tolist()
    if all(low == high for low, high in [(min(spread, default=0), max(spread, default=0)), *extremes]):
        return None
    return hash((tuple(tensors[0].shape), tuple(spread), extremes))  # of numbers: hashes of str differ over processes
