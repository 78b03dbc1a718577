"""The detector of jumps: loss, gradient norm, learning rate, loss scale and durations against their own history.

A jump of the loss is told when it has not recovered after some steps. The earliest number of a cascade that has jumped
is its likeliest cause. A spike that recovers is ordinary.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from rawloop.watch.drifts import Drifts, swings
from rawloop.watch.findings import MOST_CAUSES, Cause, Finding, Place, Whose
from rawloop.watch.history import History
from rawloop.watch.subject import Detector, StepRecord, Subject
from rawloop.watch.times import Times

RECENT = 40  # steps of history: longer ago, losses were higher
PATIENCE, LEAST_AFTER = 10, 4  # applied steps in which a spike may recover; before the end of the watch
CASCADE = 20  # steps before a jump of the loss in which its causes lie
RISEN = 1.1  # times the least rate of the history: a warm-up, or another schedule that still rises
# What may cause a jump of the loss: whose, what, phase and advice. Of two at the same step, the first is likelier.
CAUSES: dict[str, tuple[Whose, str, str, str]] = {
    "rise": ("optimizer", "learning rate has risen", "update", "lower the largest rate, or warm up to it more slowly"),
    "lr": ("optimizer", "learning rate rose", "update", "correct the schedule, or warm up to this rate"),
    "scale": ("precision", "loss scale fell", "backward", "look at its skips"),
    "grad_norm": ("data", "gradient norm rose", "backward", "look at the samples of this step, and clip the norm"),
}


class Event(NamedTuple):
    """A number that has left its history: at which step, from which median, to which value."""

    name: str
    step: int
    before: float
    after: float
    ids: tuple[str, ...] = ()


@dataclass
class Spike:
    """A loss that stood out."""

    event: Event
    ceiling: float  # the largest of the losses before it
    rise: Event | None  # of the learning rate before it
    came_back: bool = False
    after: list[float] = field(default_factory=list)  # the losses since then, or since it came back


class Jumps(Detector):
    """Compares each step's numbers with their history, and says what jumped first."""

    def __init__(self) -> None:
        self._histories = {name: History(RECENT) for name in ("loss", "grad_norm", "lr", "scale")}
        self._events: deque[Event] = deque(maxlen=32)
        self._spike: Spike | None = None
        self._lr: float | None = None
        self._drifts, self._times = Drifts(), Times()

    def gradients(self, subject: Subject, record: StepRecord) -> Iterable[Finding]:
        """Read the learning rate of this update, before the schedule changes it."""
        self._lr = _largest_lr(subject)
        return ()

    def end(self, subject: Subject, record: StepRecord) -> Iterable[Finding]:
        """Look at the numbers of a step."""
        lr, self._lr = self._lr, None
        for name, value in (("lr", lr), ("scale", record.scale), ("grad_norm", record.grad_norm)):
            if value is not None:
                history = self._histories[name]
                if history.is_known and _has_jumped(name, value, history):
                    self._events.append(Event(name, record.step, history.median, value, record.ids))
                history.add(value)
        loss = record.loss
        if loss is not None and record.applied is not False:
            yield from self._follow_loss(loss, record, subject)
            if math.isfinite(loss):
                yield from self._drifts.find(subject, record, loss, self._near)
        yield from self._times.find(subject, record)

    def finish(self, subject: Subject) -> Iterable[Finding]:
        """Tell a jump that had not recovered when the watch ended."""
        spike = self._spike
        if spike is not None and not spike.came_back and len(spike.after) >= LEAST_AFTER:
            yield from self._judge(spike, subject, spike.event.step + len(spike.after), ended=True)

    def _follow_loss(self, loss: float, record: StepRecord, subject: Subject) -> Iterator[Finding]:
        history, spike = self._histories["loss"], self._spike
        event = Event("loss", record.step, history.median, loss, record.ids)
        if not math.isfinite(loss):
            near = [event for event in self._events if record.step - CASCADE <= event.step < record.step]
            if history.is_known and any(math.isfinite(event.after) for event in near):
                yield self._jump(
                    "loss_jumped", event, None, subject, record.step, f"the loss became {loss} after a jump"
                )
            return
        waits = spike is not None and not spike.came_back
        may_swing = 2 * history.largest - history.smallest  # a loss that swings may leave its range by that range
        if not waits and history.stands_out(loss) and not (swings(subject, record) and loss < may_swing):
            self._spike = Spike(event, history.recent_largest, _rise(self._histories["lr"], record.step))
            return
        if not waits:
            history.add(loss)
        if spike is not None:
            spike.after.append(loss)
            yield from self._judge(spike, subject, record.step)

    def _judge(self, spike: Spike, subject: Subject, step: int, ended: bool = False) -> Iterator[Finding]:
        """Tell a spike when two losses in a row are as before, or a jump when that has not come in time."""
        after, middle = spike.after, sorted(spike.after)[len(spike.after) // 2]
        in_time = ended or len(after) >= PATIENCE
        numbers = f"from {spike.event.before:.4g} to {spike.event.after:.4g}"
        if spike.came_back:
            if in_time and middle > spike.ceiling:
                what = f"the loss jumped {numbers}, came back, and is higher than before (at most {spike.ceiling:.4g} "
                what += f"in the steps before, median {middle:.4g} in the last {PATIENCE})"
                yield self._jump("loss_jumped", spike.event, spike.rise, subject, step, what)
            self._spike = None if in_time else spike
            return
        if not in_time and not (len(after) >= 2 and max(after[-2:]) <= spike.ceiling):
            return
        if max(after[-2:]) <= spike.ceiling or middle <= spike.ceiling:
            what = f"the loss rose {numbers} and recovered"
            yield self._jump("loss_spiked", spike.event, None, subject, step, what)
            self._spike = Spike(spike.event, spike.ceiling, spike.rise, came_back=True)
        else:
            what = f"the loss jumped {numbers} and has not recovered after {len(after)} steps (median {middle:.4g})"
            yield self._jump("loss_jumped", spike.event, spike.rise, subject, step, what)
            self._histories["loss"], self._spike = History(RECENT), None
        for value in after:
            self._histories["loss"].add(value)

    def _jump(self, kind: str, event: Event, rise: Event | None, subject: Subject, step: int, what: str) -> Finding:
        causes = self._causes(event)
        if rise is not None and causes[0][1].whose != "optimizer":
            causes = [(event.step, _cause_of(rise)), *causes][:MOST_CAUSES]
        since, ordinary = min(event.step, causes[0][0]), kind == "loss_spiked"
        return Finding(kind, what, tuple(cause for _, cause in causes), step, subject.world.rank, ordinary, since)

    def _causes(self, event: Event) -> list[tuple[int, Cause]]:
        """Return the step and the cause of what jumped before an event, or with it, the earliest first."""
        found = [e for e in self._firsts(event.step - CASCADE, event.step) if e.name != "lr" or e.step < event.step]
        causes = [(e.step, _cause_of(e)) for e in found]  # an update acts on the next step's loss
        if not any(e.step < event.step for e in found):
            causes.insert(0, (event.step, _batch_of(event)))
        return causes[:MOST_CAUSES]

    def _near(self, step: int) -> list[Cause]:
        """Return the causes of what jumped around a step."""
        return [_cause_of(e) for e in self._firsts(step - 2 * CASCADE, step + 2 * CASCADE)][:MOST_CAUSES]

    def _firsts(self, begin: int, end: int) -> list[Event]:
        """Return the first jump of each number from one step to another, the earliest first."""
        firsts = {e.name: e for e in reversed(self._events) if begin <= e.step <= end}
        return sorted(firsts.values(), key=lambda e: (e.step, list(CAUSES).index(e.name)))


def _has_jumped(name: str, value: float, history: History) -> bool:
    if name == "scale":
        return value < history.smallest / 2
    if name == "grad_norm" and not math.isfinite(value):
        return True
    return value > 2 * history.largest and (name == "lr" or history.zscore(value) > 8)


def _rise(rates: History, step: int) -> Event | None:
    """Return the rise of a learning rate that is at its highest, as in a warm-up; None if it is not."""
    before = list(rates.values)[-CASCADE - 1 : -1]  # the update of this step acts on later losses
    rises = len(before) > 1 and before[-1] == max(before) > RISEN * before[0]
    return Event("rise", step, before[0], before[-1]) if rises else None


def _cause_of(event: Event) -> Cause:
    whose, what, phase, advice = CAUSES[event.name]
    when = "until" if event.name == "rise" else "at"
    numbers = f"from {event.before:.4g} to {event.after:.4g} {when} step {event.step}"
    place = Place(phase, sample=", ".join(event.ids[:4]) if whose == "data" else "")
    evidence = {"before": event.before, "after": event.after, "at step": event.step}
    return Cause(whose, f"the {what} {numbers}", place, evidence, advice)


def _batch_of(event: Event) -> Cause:
    evidence = {"usual loss": event.before, "loss": event.after, "at step": event.step}
    what = f"the batch of step {event.step} has an outlying loss"
    place = Place("data", sample=", ".join(event.ids[:8]))
    return Cause("data", what, place, evidence, "look at its samples, text and labels")


def _largest_lr(subject: Subject) -> float | None:
    rates = [group["lr"] for optimizer in subject.optimizers for group in optimizer.param_groups]
    rates = [rate for rate in rates if not (isinstance(rate, Tensor) and rate.device.type != "cpu")]
    return max(map(float, rates), default=None)
