"""Slow changes of the loss: it rises from the start, or over many steps."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from statistics import fmean, median

from rawloop.watch.findings import Cause, Finding, Place
from rawloop.watch.subject import StepRecord, Subject

BLOCK = 25  # steps of which one mean is made
RISING, NOISES = 4, 100  # such means, that rise; standard deviations of blocks
LEAST, EARLY = 20, 100  # steps in which a loss that rises from the start is told
Near = Callable[[int], Sequence[Cause]]


class Drifts:
    """Follows the loss over many steps."""

    def __init__(self) -> None:
        self._first: list[float] = []
        self._first_norm = 0.0
        self._block: list[float] = []
        self._means: deque[float] = deque(maxlen=RISING)  # of the last blocks, from that of the lowest mean on
        self._noises: deque[float] = deque(maxlen=NOISES)
        self._best, self._since = math.inf, 0  # the lowest mean, and the first step after its block
        self._told = False

    def find(self, subject: Subject, record: StepRecord, lr: float | None, near: Near) -> Iterator[Finding]:
        """Look at the finite loss of an applied step; `near` returns the causes that have jumped before a step."""
        assert record.loss is not None
        if self._told:
            return
        if len(self._first) < EARLY:
            self._first_norm = self._first_norm or record.grad_norm or 0.0
            self._first.append(record.loss)
            if len(self._first) >= LEAST and self._rose():
                self._told = True
                yield self._rising(subject, record, lr)
        self._block.append(record.loss)
        if len(self._block) == BLOCK:
            mean = fmean(self._block)
            if mean < self._best:
                self._best, self._since = mean, record.step + 1
                self._means.clear()
            self._means.append(mean)
            self._noises.append(math.dist(self._block, [mean] * BLOCK) / math.sqrt(BLOCK))
            self._block = []
            yield from self._find_divergence(subject, record, near)

    def _rose(self) -> bool:
        start, now = max(self._first[:3]), min(self._first[-5:])
        return now > 3 * start and min(self._first) > 0 and now > 2 * median(self._first)

    def _rising(self, subject: Subject, record: StepRecord, lr: float | None) -> Finding:
        what = (
            f"the loss rises from the start: {self._first[0]:.4g} at first, {self._first[-1]:.4g} at step {record.step}"
        )
        rate = "unknown" if lr is None else lr
        evidence = {"first norm": self._first_norm, "norm": record.grad_norm or 0.0, "lr": rate}
        steep = Cause("optimizer", "the learning rate is too high", Place("update"), evidence, "divide it by 10")
        sign = Cause("loss", "the loss has the wrong sign", Place(), {}, "check the sign of each of its terms")
        ordinary, rank = swings(subject, record), subject.world.rank
        return Finding("loss_diverges", what, (steep, sign), record.step, rank, ordinary, since=0)

    def _find_divergence(self, subject: Subject, record: StepRecord, near: Near) -> Iterator[Finding]:
        best, now, since = self._best, self._means[-1], self._since
        rising = len(self._means) == RISING and all(one < two for one, two in pairwise(self._means))
        if not rising or now - best < max(2 * median(self._noises), 0.25 * abs(best)):
            return
        self._told = True
        what = f"the loss rises since about step {since}: its mean was {best:.4g} and is {now:.4g}"
        evidence = {"best mean": best, "mean now": now, "steps": record.step - since + 1}
        advice = "lower the learning rate, or resume from before this step"
        unknown = Cause("not known", "no other number jumped when it began to rise", Place(), evidence, advice)
        causes, rank = tuple(near(since)) or (unknown,), subject.world.rank
        yield Finding("loss_diverges", what, causes, record.step, rank, swings(subject, record), since)


def swings(subject: Subject, record: StepRecord) -> bool:
    """Whether the loss is a sum of several that work against each other, as in a GAN, where a rise may be healthy.

    That is so with several optimizers, and with backward passes of losses for which the model was not called again.
    """
    return len(subject.optimizers) > 1 or record.facts.backwards > record.facts.calls > 0
