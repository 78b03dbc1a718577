"""The learning rate against its own history, for each group of each optimizer."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from rawloop.watch.findings import Cause, Finding, Place
from rawloop.watch.held import Evidence, groups_of
from rawloop.watch.subject import Detector, StepRecord, Subject

JUMP = 10.0  # schedules rise by less from one update to the next, except in their first updates and at restarts
ABOVE = 1.5  # a restart returns to a learning rate that there has been
SHORT = 5  # updates; a warm-up may begin with jumps
STUCK = 20  # updates without learning; warm-ups begin and schedules end with one or few
FEW = 3  # updates; the same at the end of a watch that has seen no other learning rate


@dataclass
class Rate:
    """What is known of the learning rates of a group's updates so far."""

    step: int = -1
    last: float = 0.0
    before: float | None = None  # the last
    largest: float = 0.0
    updates: int = 0
    zeros: int = 0  # at the end
    zero_since: int = 0


class LearningRates(Detector):
    """Finds learning rates that are no numbers or negative, that jump, or that stay at zero.

    Kinds: `lr_impossible`, `lr_jump`, `lr_zero`.
    """

    def __init__(self) -> None:
        self.histories: dict[str, Rate] = {}

    def start(self, subject: Subject) -> Iterator[Finding]:
        """Look at the learning rates before the first update."""
        for label, value in rates(subject, reading=True).items():
            if not 0 <= value < math.inf:
                yield impossible(subject, label, value, 0)

    def gradients(self, subject: Subject, record: StepRecord) -> Iterator[Finding]:
        """Look at the learning rates of an update."""
        values = rates(subject, record.probing)
        for label, value in values.items():
            history = self.histories.setdefault(label, Rate())
            if record.step == history.step:  # several optimizers step in one step
                continue
            if not 0 <= value < math.inf:
                yield impossible(subject, label, value, record.step)
                continue
            known = history.updates >= SHORT and history.last > 0
            if known and value >= JUMP * history.last and value > ABOVE * history.largest:
                yield jumped(subject, label, value, record.step, history)
            history.zeros = history.zeros + 1 if value == 0 else 0
            history.zero_since = history.zero_since if value == 0 and history.zeros > 1 else record.step
            history.before = history.last if history.updates else None
            history.step, history.last, history.updates = record.step, value, history.updates + 1
            history.largest = max(history.largest, value)
            if history.zeros == STUCK:
                yield stuck(subject, label, history, values)

    def finish(self, subject: Subject) -> Iterator[Finding]:
        """Look at groups that have never learned."""
        values = rates(subject, reading=True)
        for label, history in self.histories.items():
            if history.largest == 0 and FEW <= history.zeros < STUCK and history.zeros == history.updates:
                yield stuck(subject, label, history, values)


def rates(subject: Subject, reading: bool) -> dict[str, float]:
    """Return the learning rate of each group that has one, by label. A tensor on a device is read only if `reading`."""
    found = {}
    for label, _, group in groups_of(subject):
        value = group.get("lr")
        if value is not None and (reading or not isinstance(value, Tensor) or value.is_cpu):
            found[label] = float(value)
    return found


def impossible(subject: Subject, label: str, value: float, step: int) -> Finding:
    """Return the finding for a learning rate that is negative or not finite."""
    what = "a negative learning rate climbs the loss" if -math.inf < value < 0 else "the update destroys the weights"
    cause = Cause("optimizer", what, Place(phase="update", optimizer=label), {"lr": value}, "Look at the schedule")
    return Finding("lr_impossible", f"the learning rate of {label} is {value:g}", (cause,), step, subject.world.rank)


def jumped(subject: Subject, label: str, value: float, step: int, history: Rate) -> Finding:
    """Return the finding for a learning rate far above all that came before."""
    evidence: Evidence = {"lr": value, "lr of the update before": history.last, "largest lr before": history.largest}
    what = f"the learning rate rose {value / history.last:.3g} times from one update to the next"
    advice = "Look at the schedule, and at code that sets lr: no restart leads above the largest lr so far"
    cause = Cause("optimizer", what, Place(phase="update", optimizer=label), evidence, advice)
    return Finding("lr_jump", f"the learning rate of {label} jumps", (cause,), step, subject.world.rank)


def stuck(subject: Subject, label: str, history: Rate, values: dict[str, float]) -> Finding:
    """Return the finding for a group whose learning rate stays at zero."""
    evidence: Evidence = {"updates at zero": history.zeros, "largest lr before": history.largest}
    other = next((other for other, value in values.items() if other != label and value > 0), None)
    if other is not None:
        evidence[f"lr of {other}"] = values[other]
    advice = "Look at the schedule: whole-number division, a horizon that is over, or a group without its own rate"
    cause = Cause(
        "optimizer", "its parameters are not trained", Place(phase="update", optimizer=label), evidence, advice
    )
    what = f"the learning rate of {label} has been zero for {history.zeros} updates"
    return Finding("lr_zero", what, (cause,), history.step, subject.world.rank, since=history.zero_since)
