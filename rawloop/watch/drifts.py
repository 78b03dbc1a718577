"""Slow changes: a loss that rises over many steps."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from statistics import fmean, median

from rawloop.watch.findings import Cause, Finding, Place
from rawloop.watch.subject import StepRecord, Subject

BLOCK = 25  # steps of which one mean is made
RISING, NOISES = 4, 100  # such means, that rise; standard deviations of blocks
Near = Callable[[int], Sequence[Cause]]


class Drifts:
    """Follows the loss over many steps."""

    def __init__(self) -> None:
        self._block: list[float] = []
        self._means: deque[float] = deque(maxlen=RISING)  # of the last blocks, from that of the lowest mean on
        self._noises: deque[float] = deque(maxlen=NOISES)
        self._best, self._since = math.inf, 0  # the lowest mean, and the first step after its block
        self._told = False

    def find(self, subject: Subject, record: StepRecord, loss: float, near: Near) -> Iterator[Finding]:
        """Look at the finite loss of an applied step; `near` returns the causes that have jumped around a step."""
        if not self._told:
            self._block.append(loss)
        if len(self._block) < BLOCK:
            return
        mean = fmean(self._block)
        if mean < self._best:
            self._best, self._since = mean, record.step + 1
            self._means.clear()
        self._means.append(mean)
        self._noises.append(math.dist(self._block, [mean] * BLOCK) / math.sqrt(BLOCK))
        self._block = []
        rising = len(self._means) == RISING and all(one < two for one, two in pairwise(self._means))
        if rising and mean - self._best >= max(2 * median(self._noises), 0.25 * abs(self._best)):
            self._told = True
            yield self._finding(subject, record, near(self._since))

    def _finding(self, subject: Subject, record: StepRecord, causes: Sequence[Cause]) -> Finding:
        since, best, now = self._since, self._best, self._means[-1]
        what = f"the loss rises since about step {since}: its mean was {best:.4g} and is {now:.4g}"
        if not causes and since <= BLOCK:
            since, what = 0, f"the loss rises from the start: its mean was {best:.4g} and is {now:.4g}"
            steep = Cause("optimizer", "the learning rate is too high", Place("update"), {}, "divide it by 10")
            causes = steep, Cause("loss", "the loss has the wrong sign", advice="check the sign of each of its terms")
        evidence = {"best mean": best, "mean now": now, "steps": record.step - since + 1}
        advice = "lower the learning rate, or resume from before this step"
        unknown = Cause("not known", "no other number jumped when it began to rise", Place(), evidence, advice)
        found, rank = tuple(causes) or (unknown,), subject.world.rank
        return Finding("loss_diverges", what, found, record.step, rank, swings(subject, record), since)


def swings(subject: Subject, record: StepRecord) -> bool:
    """Whether the loss is a sum of several that work against each other, as in a GAN, where a rise may be healthy.

    That is so with several optimizers, and with backward passes of losses for which the model was not called again.
    """
    return len(subject.optimizers) > 1 or record.facts.backwards > record.facts.calls > 0
