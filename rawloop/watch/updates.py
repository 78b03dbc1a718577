"""The updates that optimizers make, from a sample of their state: lost to rounding, or too large."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from rawloop.watch.findings import Cause, Finding, Whose
from rawloop.watch.held import HALF, Evidence, by_label, held_by_optimizers, rms_of, short
from rawloop.watch.rates import LearningRates, Rate
from rawloop.watch.sample import Sample, is_adam, is_plain_sgd, sampled
from rawloop.watch.subject import Detector, StepRecord, Subject

LOST = 0.5  # share; 16-bit weights lose a few small updates at any learning rate
USUAL_LR = 0.5  # times the largest so far: below, a schedule ends, and its updates may be lost
RISING = 1.01  # from one update to the next: a warm-up, whose first updates may be lost
ZERO_HALF, ZERO = 1e-3, 0.5  # share of second moments; each such number gets an update of m / eps
STILL = 0.5  # share of second moments that cannot shrink
DROWNED = 0.5  # share of second moments below eps^2
TOO_FAST_ONCE, TOO_FAST = 1.0, 0.3  # update / weight: once, or at two probes in a row; usual are 1e-4 to 1e-2
TINY = 1e-4  # rms of a matrix at the start: one that starts near zero moves fast by design


class Rule(NamedTuple):
    """A finding to make if the share of a count in another one, of those that `Sample` has, is above a limit."""

    kind: str
    row: str
    of: str
    limit: float
    what: str
    whose: Whose
    why: str
    advice: str


class Updates(Detector):
    """Finds updates that rounding loses, second moments that are zero or stand still, and updates of an absurd size.

    It samples weights and state on probing steps, reading the device once for each group and dtype. Optimizers that are
    neither SGD nor keep `exp_avg` and `exp_avg_sq` are not measured.

    Kinds: `updates_lost`, `second_moment_zero`, `second_moment_cannot_move`, `eps_dominates`, `update_too_large`.
    """

    def __init__(self, rates: LearningRates) -> None:
        self._rates = rates  # looks at each step before this detector
        self._near_zero: set[str] = set()  # matrices that start near zero
        self._fast: Counter[str] = Counter()  # probes in a row
        self._waiting: list[tuple[Rate, float, Finding]] = []  # dropped if the learning rate rises in the next update
        self._step = -1

    def start(self, subject: Subject) -> Iterable[Finding]:
        """Measure the weights that start near zero."""
        held = held_by_optimizers(subject)
        sizes = rms_of([one.parameter for one in held])
        self._near_zero = {one.name for one, rms in zip(held, sizes, strict=True) if rms < TINY}
        return ()

    def gradients(self, subject: Subject, record: StepRecord) -> Iterator[Finding]:
        """Measure the updates of SGD without momentum, which are its gradients."""
        if record.step != self._step:  # several optimizers step in one step
            self._step = record.step
            yield from self._release()
            if record.probing:
                yield from self._judge(subject, record, sgd=True)

    def end(self, subject: Subject, record: StepRecord) -> Iterator[Finding]:
        """Measure the updates of the other optimizers from their state."""
        if record.probing and record.applied:
            yield from self._judge(subject, record, sgd=False)

    def finish(self, subject: Subject) -> Iterator[Finding]:
        """Tell what no rise of the learning rate explains."""
        yield from self._release(ended=True)

    def _release(self, ended: bool = False) -> Iterator[Finding]:
        waiting, self._waiting = self._waiting, []
        yield from (finding for rate, lr, finding in waiting if ended or rate.last <= RISING * lr)

    def _judge(self, subject: Subject, record: StepRecord, sgd: bool) -> Iterator[Finding]:
        for label, held in by_label(held_by_optimizers(subject)).items():
            mine = [one for one in held if is_plain_sgd(one) == sgd]
            scale = record.scales.get(id(held[0].optimizer), record.scale) if sgd else 1.0
            rate = self._rates.histories.get(label, Rate())
            for sample in sampled(mine, rate.last, scale):
                yield from judged(subject, record, sample, rules_of_moments(sample) if is_adam(sample.held[0]) else ())
                yield from self._too_large(subject, record, sample)
                rising = rate.before is not None and rate.last > RISING * rate.before
                if not rising and rate.last >= USUAL_LR * rate.largest > 0:
                    lost = judged(subject, record, sample, [rule_of_rounding(sample.held[0].parameter.dtype)])
                    self._waiting += [(rate, rate.last, finding) for finding in lost]

    def _too_large(self, subject: Subject, record: StepRecord, sample: Sample) -> Iterator[Finding]:
        for place, one in enumerate(sample.held):
            ratio = sample.ratio(place)
            if one.parameter.ndim < 2 or one.name in self._near_zero:
                continue
            self._fast[one.name] = self._fast[one.name] + 1 if ratio > TOO_FAST else 0  # NaN is not fast
            if ratio > TOO_FAST_ONCE or self._fast[one.name] > 1:
                evidence: Evidence = {"update / weight": ratio, "usual": "1e-4 to 1e-2", "lr": sample.lr}
                what = "one update replaces a large part of the weights"
                cause = Cause("optimizer", what, one.place, evidence, "Lower the learning rate, or warm it up")
                what = f"an update is {ratio:.2g} times the weights ({one.label})"
                yield Finding("update_too_large", what, (cause,), record.step, subject.world.rank)


def judged(subject: Subject, record: StepRecord, sample: Sample, rules: Iterable[Rule]) -> Iterator[Finding]:
    """Yield the findings of the rules that a sample breaks."""
    one = sample.held[0]
    evidence: Evidence = {"lr": sample.lr, "weights' dtype": short(one.parameter.dtype)}
    if is_adam(one):
        evidence |= {"state dtype": short(one.state["exp_avg"].dtype), "eps": float(one.group["eps"])}
        evidence["beta2"] = float(one.group["betas"][1])
    for rule in rules:
        share = sample.share(rule.row, rule.of)
        if share > rule.limit:
            place = sample.first(rule.row, rule.of, rule.limit).place
            cause = Cause(rule.whose, rule.why, place, evidence | {"share": share}, rule.advice)
            what = f"{share:.1%} of {rule.what} ({one.label})"
            yield Finding(rule.kind, what, (cause,), record.step, subject.world.rank)


def rules_of_moments(sample: Sample) -> Iterator[Rule]:
    """Yield the rules of Adam's second moments."""
    dtype = sample.held[0].state["exp_avg"].dtype
    limit = ZERO_HALF if dtype in HALF else ZERO
    what = "second moments are zero though their gradients are not"
    why = "squares of small gradients round to zero in the state's dtype, and the update becomes m / eps"
    advice = "Keep float32 state: float32 weights under autocast, or float32 masters"
    yield Rule("second_moment_zero", "zero", "active", limit, what, "precision", why, advice)
    what = "second moments cannot shrink"
    why = f"1 - beta2 is below half a unit in the last place of {short(dtype)}: they can rise and not fall"
    advice = "Keep float32 state, or lower beta2 (0.95)"
    yield Rule("second_moment_cannot_move", "still", "moving", STILL, what, "precision", why, advice)
    what = "second moments are below eps^2"
    why = "eps is larger than their root, so updates follow the gradients' size as in SGD"
    advice = "Lower eps, or look why the gradients are so small (a loss divided twice)"
    yield Rule("eps_dominates", "drowned", "moving", DROWNED, what, "optimizer", why, advice)


def rule_of_rounding(dtype: torch.dtype) -> Rule:
    """Return the rule of updates that weights of a dtype lose."""
    whose: Whose = "precision" if dtype in HALF else "optimizer"
    why = f"updates smaller than half a unit in the last place of {short(dtype)} leave the weight as it is"
    advice = "Raise the learning rate"
    if dtype in HALF:
        advice = "Train float32 weights under autocast, or let the optimizer hold float32 masters"
    return Rule("updates_lost", "lost", "active", LOST, "the updates are lost to rounding", whose, why, advice)
