"""The learning rate against its own history, for each group of each optimizer."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from rawloop.watch.findings import Cause, Finding, Place
from rawloop.watch.held import Evidence, label_of, number
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
    largest: float = 0.0
    updates: int = 0
    zeros: int = 0  # at the end
    zero_since: int = 0


class LearningRates(Detector):
    """Finds learning rates that are no numbers or negative, that jump, or that stay at zero.

    Kinds: `lr_not_a_number`, `lr_negative`, `lr_jump`, `lr_zero`.
    """

    def __init__(self) -> None:
        self._histories: dict[str, Rate] = {}

    def start(self, subject: Subject) -> Iterator[Finding]:
        """Look at the learning rates before the first update."""
        for label, value in rates(subject, reading=True).items():
            yield from impossible(subject, label, value, 0)

    def gradients(self, subject: Subject, record: StepRecord) -> Iterator[Finding]:
        """Look at the learning rates of an update."""
        values = rates(subject, record.probing)
        for label, value in values.items():
            history = self._histories.setdefault(label, Rate())
            if record.step == history.step:  # several optimizers step in one step
                continue
            if not 0 <= value < math.inf:
                yield from impossible(subject, label, value, record.step)
                continue
            yield from jump(subject, label, value, record.step, history)
            history.zeros = history.zeros + 1 if value == 0 else 0
            history.zero_since = history.zero_since if value == 0 and history.zeros > 1 else record.step
            history.step, history.last, history.updates = record.step, value, history.updates + 1
            history.largest = max(history.largest, value)
            if history.zeros == STUCK:
                yield stuck(subject, label, history, values)

    def finish(self, subject: Subject) -> Iterator[Finding]:
        """Look at groups that have never learned."""
        values = rates(subject, reading=True)
        for label, history in self._histories.items():
            if history.largest == 0 and FEW <= history.zeros < STUCK and history.zeros == history.updates:
                yield stuck(subject, label, history, values)


def rates(subject: Subject, reading: bool) -> dict[str, float]:
    """Return the learning rate of each group that has one, by label. A tensor on a device is read only if `reading`."""
    found = {}
    for optimizer in subject.optimizers:
        for index, group in enumerate(optimizer.param_groups):
            value = group.get("lr")
            on_device = isinstance(value, Tensor) and value.device.type != "cpu"
            if value is not None and (reading or not on_device):
                found[label_of(subject, optimizer, index)] = number(value)
    return found


def impossible(subject: Subject, label: str, value: float, step: int) -> Iterator[Finding]:
    """Yield a finding for a learning rate that is negative or not finite."""
    if 0 <= value < math.inf:
        return
    kind = "lr_negative" if -math.inf < value < 0 else "lr_not_a_number"
    what = "a negative learning rate climbs the loss" if kind == "lr_negative" else "the update destroys the weights"
    cause = Cause("optimizer", what, Place(phase="update", optimizer=label), {"lr": value}, "Look at the schedule")
    yield Finding(kind, f"the learning rate of {label} is {value:g}", (cause,), step, subject.world.rank)


def jump(subject: Subject, label: str, value: float, step: int, history: Rate) -> Iterator[Finding]:
    """Yield a finding for a learning rate far above all that came before."""
    if (
        history.updates >= SHORT
        and history.last > 0
        and value >= JUMP * history.last
        and value > ABOVE * history.largest
    ):
        evidence: Evidence = {
            "lr": value,
            "lr of the update before": history.last,
            "largest lr before": history.largest,
        }
        what = f"the learning rate rose {value / history.last:.3g} times from one update to the next"
        advice = "Look at the schedule, and at code that sets lr: no restart leads above the largest lr so far"
        cause = Cause("optimizer", what, Place(phase="update", optimizer=label), evidence, advice)
        yield Finding("lr_jump", f"the learning rate of {label} jumps", (cause,), step, subject.world.rank)


def stuck(subject: Subject, label: str, history: Rate, values: dict[str, float]) -> Finding:
    """Return the finding for a group whose learning rate stays at zero."""
    evidence: Evidence = {"updates at zero": history.zeros, "largest lr before": history.largest}
    others = {other: value for other, value in values.items() if other != label and value > 0}
    evidence |= {f"lr of {other}": value for other, value in list(others.items())[:1]}
    what = "its parameters are not trained"
    advice = "Look at the schedule: whole-number division, a horizon that is over, or a group without its own rate"
    cause = Cause("optimizer", what, Place(phase="update", optimizer=label), evidence, advice)
    what = f"the learning rate of {label} has been zero for {history.zeros} updates"
    return Finding("lr_zero", what, (cause,), history.step, subject.world.rank, since=history.zero_since)
