"""The detector of bad data: it looks at batches as they come, in any loop, and needs no family."""

import math
from collections.abc import Iterable

from rawloop.errors import first_few
from rawloop.watch.entries import Look
from rawloop.watch.features import Features
from rawloop.watch.findings import Finding, Place
from rawloop.watch.ids import Ids
from rawloop.watch.masked import find_masked
from rawloop.watch.repeats import Repeats
from rawloop.watch.subject import Detector, StepRecord, Subject
from rawloop.watch.targets import Padding, Stops

FIRST = 3  # steps that are looked at in full


class Batches(Detector):
    """Looks at every batch: at small tensors on the host in each step, at all tensors on the first and probing steps.

    A step whose loss or gradient norm is not finite has its batch looked at in full.
    """

    def __init__(self) -> None:
        self._features, self._ids, self._repeats = Features(), Ids(), Repeats()
        self._stops, self._padding = Stops(), Padding()
        self._look: Look | None = None
        self._seen = 0

    def batch(self, subject: Subject, record: StepRecord) -> Iterable[Finding]:
        """Look at a batch, before its forward pass."""
        look = self._look = Look(subject, record, record.probing or self._seen < FIRST)
        self._seen += 1
        if not look.entries and record.batch is not None:
            yield _no_tensors(look)
        yield from find_masked(look)
        yield from self._features.find(look)
        yield from self._ids.find(look)
        yield from self._repeats.find(look)
        self._padding.find(look)
        yield from self._stops.find(look)

    def gradients(self, subject: Subject, record: StepRecord) -> Iterable[Finding]:
        """Yield what the hooks of the forward pass have found, and whether the loss scores padding."""
        yield from self._ids.found()
        yield from self._padding.found(subject, record)

    def end(self, subject: Subject, record: StepRecord) -> Iterable[Finding]:
        """Look again at the batch of a step that has gone wrong."""
        yield from self._ids.ended()
        look, self._look = self._look, None
        if look is not None and not all(math.isfinite(number or 0.0) for number in (record.loss, record.grad_norm)):
            look.full = True
            yield from find_masked(look, ill=True)
            yield from self._features.find(look)

    def failed(self, subject: Subject, record: StepRecord) -> Iterable[Finding]:
        """Yield what a step has found that did not come to its end."""
        return self._ids.failed()

    def finish(self, subject: Subject) -> Iterable[Finding]:
        """Yield what a step has found that did not come to its end, and judge what is counted."""
        yield from self._ids.ended()
        yield from self._stops.judge()


def _no_tensors(look: Look) -> Finding:
    batch = look.record.batch
    got = f"a {type(batch).__name__}"
    if hasattr(batch, "keys"):
        got += f" with the keys {first_few([*batch.keys()] or ['none'])}"
    elif isinstance(batch, list | tuple):
        got += f" of {len(batch)} values of type {first_few({type(item).__name__: 0 for item in batch} or ['none'])}"
    what = f"the batch has no tensors that can be read: it is {got}"
    advice = "pass the tensors to watch.step, in dicts, lists or dataclasses, for looks at the data"
    return look.finding("no_tensors", what, Place("data"), {}, advice, ordinary=True)
