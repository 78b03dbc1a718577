"""The updates that optimizers make, from a sample of their state: lost to rounding, or too large."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from rawloop.watch.findings import Finding, Whose
from rawloop.watch.held import HALF, Evidence, by_label, held_by_optimizers, rms_of, short, told
from rawloop.watch.rates import LearningRates, Rate
from rawloop.watch.sample import Sample, is_plain_sgd, sampled
from rawloop.watch.subject import Detector, StepRecord, Subject

LOST = 0.5  # share; 16-bit weights lose a few small updates at any learning rate
USUAL_LR = 0.5  # times the largest so far: below, a schedule ends, and its updates may be lost
RISING = 1.01  # from one update to the next: a warm-up, whose first updates may be lost
ZERO_HALF, ZERO = 1e-3, 0.5  # share of second moments; each such number gets an update of m / eps
STILL = 0.5  # share of second moments that cannot shrink
DROWNED = 0.9  # share of second moments below eps^2, after the first update: those of unused inputs may be
TOO_FAST_ONCE, TOO_FAST = 1.0, 0.3  # update / weight: once, or at two probes in a row; usual are 1e-4 to 1e-2
TINY = 1e-4  # rms of a matrix at the start: one that starts near zero moves fast by design
WHOSE_ROUNDING: dict[bool, tuple[Whose, str]] = {  # by whether the weights are in 16 bits
    False: ("optimizer", "Raise the learning rate"),
    True: ("precision", "Train float32 weights under autocast, or let the optimizer hold float32 masters"),
}


class Rule(NamedTuple):
    """A finding to make if the share of a count in another one, of those that `Sample` has, is above a limit."""

    kind: str
    row: str
    of: str
    limit: float
    what: str
    whose: Whose
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
        sizes = rms_of([one.numbers for one in held])
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
            rising = rate.before is not None and rate.last > RISING * rate.before
            usual = not rising and rate.last >= USUAL_LR * rate.largest > 0
            for sample in sampled(mine, rate.last, scale):
                found = list(judged(subject, record, sample))
                self._waiting += [(rate, rate.last, one) for one in found if one.kind == "updates_lost" and usual]
                quiet = {"updates_lost"} | ({"eps_dominates"} if rate.updates <= 1 else set())
                yield from (one for one in found if one.kind not in quiet)
                yield from self._too_large(subject, record, sample)

    def _too_large(self, subject: Subject, record: StepRecord, sample: Sample) -> Iterator[Finding]:
        for place, one in enumerate(sample.held):
            ratio = sample.ratio(place)
            if one.parameter.ndim < 2 or one.name in self._near_zero:
                continue
            self._fast[one.name] = self._fast[one.name] + 1 if ratio > TOO_FAST else 0  # NaN is not fast
            if ratio > TOO_FAST_ONCE or self._fast[one.name] > 1:
                evidence: Evidence = {"update / weight": ratio, "usual": "1e-4 to 1e-2", "lr": sample.lr}
                what = f"the learning rate {sample.lr:g} of {one.label} is too high: an update is {ratio:.3g} times "
                what, advice = f"{what}as large as the weights", "Lower the learning rate, or warm it up"
                yield told(subject, record.step, "update_too_large", "optimizer", what, one.place, evidence, advice)


def judged(subject: Subject, record: StepRecord, sample: Sample) -> Iterator[Finding]:
    """Yield the findings of the rules that a sample breaks."""
    one = sample.held[0]
    dtype, state_dtype = one.parameter.dtype, sample.state_dtype
    evidence: Evidence = {"lr": sample.lr, "weights' dtype": short(dtype), "state dtype": short(state_dtype)}
    evidence |= {name: str(one.group[name]) for name in ("betas", "eps") if name in one.group}
    for rule in rules_for(dtype, state_dtype):
        share = sample.share(rule.row, rule.of)
        if share > rule.limit:
            place, more = sample.first(rule.row, rule.of, rule.limit).place, evidence | {"share": share}
            what = f"{share:.1%} of {rule.what}"
            yield told(subject, record.step, rule.kind, rule.whose, what, place, more, rule.advice)


def rules_for(dtype: torch.dtype, state_dtype: torch.dtype) -> Iterator[Rule]:
    """Yield the rules for weights and state of these dtypes."""
    what = "second moments are zero though their gradients are not: small squares round to zero in the state's dtype"
    advice = "Keep float32 state: float32 weights under autocast, or float32 masters"
    limit = ZERO_HALF if state_dtype in HALF else ZERO
    yield Rule("second_moment_zero", "zero", "active", limit, what, "precision", advice)
    what = f"second moments cannot shrink: 1 - beta2 is below half a unit in the last place of {short(state_dtype)}"
    advice = "Keep float32 state, or lower beta2 (0.95)"
    yield Rule("second_moment_cannot_move", "still", "moving", STILL, what, "precision", advice)
    what = "second moments are below eps^2: updates follow the gradients' size as in SGD"
    advice = "Lower eps, or look why the gradients are so small (a loss divided twice)"
    yield Rule("eps_dominates", "drowned", "moving", DROWNED, what, "optimizer", advice)
    what = f"the updates are lost to rounding: they are below half a unit in the last place of {short(dtype)}"
    whose, advice = WHOSE_ROUNDING[dtype in HALF]
    yield Rule("updates_lost", "lost", "active", LOST, what, whose, advice)
