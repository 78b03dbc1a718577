"""The learning rate against its own history, for each group of each optimizer."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from rawloop.watch.findings import Finding, Place
from rawloop.watch.held import Evidence, groups_of, told
from rawloop.watch.subject import Detector, StepRecord, Subject

JUMP = 10.0  # schedules rise by less from one update to the next, except in their first updates and at restarts
ABOVE = 1.5  # a restart returns to a learning rate that there has been
SHORT = 5  # updates; a warm-up may begin with jumps
STUCK = 20  # updates without learning; warm-ups begin and schedules end with one or few


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
    why = "it climbs the loss" if -math.inf < value < 0 else "the update destroys the weights"
    what = f"the learning rate of {label} is {value:g}: {why}"
    return told(subject, step, "lr_impossible", "optimizer", what, place(label), {"lr": value}, "Look at the schedule")


def jumped(subject: Subject, label: str, value: float, step: int, history: Rate) -> Finding:
    """Return the finding for a learning rate far above all that came before."""
    what = f"the learning rate of {label} rose {value / history.last:.3g} times from one update to the next"
    evidence: Evidence = {"lr": value, "lr of the update before": history.last, "largest lr before": history.largest}
    advice = "Look at the schedule, and at code that sets lr: no restart leads above the largest lr so far"
    return told(subject, step, "lr_jump", "optimizer", what, place(label), evidence, advice)


def stuck(subject: Subject, label: str, history: Rate, values: dict[str, float]) -> Finding:
    """Return the finding for a group whose learning rate stays at zero."""
    what = f"the learning rate of {label} has been zero for {history.zeros} updates: its parameters are not trained"
    evidence: Evidence = {"updates at zero": history.zeros, "largest lr before": history.largest}
    others = [f"{value:g} of {other}" for other, value in values.items() if value > 0]
    evidence |= {"another lr": others[0]} if others else {}
    advice = "Look at the schedule: whole-number division, a horizon that is over, or a group without its own rate"
    since = history.zero_since
    return told(subject, history.step, "lr_zero", "optimizer", what, place(label), evidence, advice, since=since)


def place(label: str) -> Place:
    """Return the place of a group."""
    return Place(phase="update", optimizer=label)
