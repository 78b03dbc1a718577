"""Batches that come again: a loader that stands still, or ranks that get the same data."""

import weakref
from collections.abc import Iterator

from torch import Tensor

from rawloop.errors import first_few
from rawloop.watch.entries import Look
from rawloop.watch.findings import Finding, Place

TIMES = 5  # equal batches in a row, before it is told
SAMPLED = 24  # values of the first tensor that are compared: reading them takes microseconds


class Repeats:
    """Compares each batch with the last one, and with those of the other ranks."""

    def __init__(self) -> None:
        self._last: int | None = None
        self._tensors: list[weakref.ref[Tensor]] = []
        self._since = self._same = self._seen = 0
        self._reused = True

    def find(self, look: Look) -> Iterator[Finding]:
        """Find batches that come again. On probing steps of several ranks, all ranks must call this."""
        digest = _digest(look)
        if digest is not None:
            self._count(look, digest)
            if self._same == TIMES:
                what = f"the same batch came {TIMES} times in a row: the loader stands still"
                advice = "draw the next batch in each step; next(iter(loader)) starts the loader again each time"
                # A loop that passes the very same tensors again means to.
                evidence, ordinary = {"times": TIMES}, self._reused
                finding = look.finding("batch_repeated", what, _place(look), evidence, advice, ordinary=ordinary)
                finding.since = self._since
                yield finding
        if not look.ours and look.subject.world.size > 1 and look.subject.config.is_due(self._seen):
            digests = look.subject.world.gather(digest)
            if digest is not None and len(set(digests)) == 1:
                what = f"all {len(digests)} ranks train on the same batch: their loaders are alike"
                advice = "give each rank its own share: a DistributedSampler, or a seed that depends on the rank"
                yield look.finding("ranks_same_batch", what, _place(look), {"ranks": len(digests)}, advice)
        self._seen += 1

    def _count(self, look: Look, digest: int) -> None:
        if digest != self._last:
            self._last, self._same, self._reused, self._since = digest, 0, True, look.record.step
        elif self._reused:
            self._reused = all(old() is entry.tensor for old, entry in zip(self._tensors, look.entries))
        self._same += 1
        self._tensors = [weakref.ref(entry.tensor) for entry in look.entries]


def _place(look: Look) -> Place:
    return Place("data", tensor=first_few([entry.path for entry in look.entries], most=2))


def _digest(look: Look) -> int | None:
    """Return a digest of the first tensor on the host and the extremes of all; None if each tensor is constant."""
    tensors = [e.tensor for e in look.entries if e.kind != "mask" and (look.full or e.tensor.is_cpu)]
    if not tensors:
        return None
    values = tensors[0].detach().flatten()
    spread = values[:: max(1, values.numel() // SAMPLED)].tolist()
    extremes = [look.extremes(entry) for entry in look.entries if look.may_read(entry)]
    if all(low == high for low, high in [(min(spread, default=0), max(spread, default=0)), *extremes]):
        return None
    # of numbers alone: hashes of strings differ over processes
    return hash((tuple(tensors[0].shape), tuple(spread), tuple(extremes)))
