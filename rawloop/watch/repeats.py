"""Batches that come again: a loader that stands still, ranks that get the same data, a sample twice in a batch."""

import weakref
from collections.abc import Iterator

from torch import Tensor

from rawloop.errors import first_few
from rawloop.watch.entries import Look
from rawloop.watch.findings import Cause, Finding, Place

TIMES = 5  # equal batches in a row, before it is told
SAMPLED = 24  # values of a tensor that are compared: reading them takes microseconds
TENSORS = 3  # that are compared


class Repeats:
    """Compares each batch with the last one, and with those of the other ranks."""

    def __init__(self) -> None:
        self._last: int | None = None
        self._tensors: list[weakref.ref[Tensor]] = []
        self._since = 0
        self._same = 0
        self._reused = True
        self._seen = 0

    def find(self, look: Look) -> Iterator[Finding]:
        """Find batches that come again. On probing steps of several ranks, all ranks must call this."""
        digest = _digest(look)
        yield from self._find_frozen(look, digest)
        yield from _find_twice(look)
        if not look.ours and look.subject.world.size > 1 and self._seen % look.subject.config.every == 0:
            digests = look.subject.world.gather(digest)
            if digest is not None and len(set(digests)) == 1:
                what = f"all {len(digests)} ranks train on the same batch"
                advice = "give each rank its own share: a DistributedSampler, or a seed that depends on the rank"
                cause = Cause("data", "the ranks' loaders are alike", _place(look), {"ranks": len(digests)}, advice)
                yield look.finding("ranks_same_batch", what, cause)
        self._seen += 1

    def _find_frozen(self, look: Look, digest: int | None) -> Iterator[Finding]:
        if digest is None:
            return
        if digest == self._last:
            self._same += 1
            before = [reference() for reference in self._tensors]
            self._reused &= all(old is entry.tensor for old, entry in zip(before, look.entries))
        else:
            self._same, self._reused, self._since = 1, True, look.record.step
        self._last, self._tensors = digest, [weakref.ref(entry.tensor) for entry in look.entries]
        if self._same == TIMES:
            what = f"the same batch came {TIMES} times in a row"
            advice = "draw the next batch in each step; next(iter(loader)) starts the loader again each time"
            cause = Cause("data", "the loader stands still", _place(look), {"times": TIMES}, advice)
            # A loop that passes the very same tensors again means to.
            finding = look.finding("batch_repeated", what, cause, ordinary=self._reused)
            finding.since = self._since
            yield finding


def _find_twice(look: Look) -> Iterator[Finding]:
    ids = look.record.ids
    if len(set(ids)) < len(ids):
        twice = next(name for number, name in enumerate(ids) if name in ids[:number])
        what = f"sample {twice} is {ids.count(twice)} times in one batch"
        cause = Cause(
            "data",
            "the sampler draws with replacement, or the data has duplicates",
            Place("data", sample=str(twice), row=ids.index(twice)),
            {"samples": len(ids), "different": len(set(ids))},
            "remove duplicates if they are not meant",
        )
        yield look.finding("sample_twice", what, cause, ordinary=True)


def _place(look: Look) -> Place:
    return Place("data", tensor=first_few([entry.path for entry in look.entries], most=2))


def _digest(look: Look) -> int | None:
    """Return a digest of values spread over the first tensors on the host; None without any, or if all are constant."""
    chosen = [e.tensor for e in look.entries if e.kind != "mask" and (look.full or e.tensor.device.type == "cpu")]
    spread = [_spread(tensor) for tensor in chosen[:TENSORS]]
    if all(min(values, default=0) == max(values, default=0) for values in spread):
        return None
    # of numbers alone: hashes of strings differ over processes
    return hash(tuple((tuple(tensor.shape), *values) for tensor, values in zip(chosen, spread)))


def _spread(tensor: Tensor) -> list[float]:
    flat = tensor.detach().flatten()
    return list(flat[:: max(1, flat.numel() // SAMPLED)].tolist())
