"""The updates that optimizers make, from a sample of their state: lost to rounding, too large, or decay alone."""

from collections.abc import Iterable, Iterator

from rawloop.watch.findings import Cause, Finding, Place
from rawloop.watch.held import HALF, Evidence, by_label, held_by_optimizers, module_of, number, rms_of
from rawloop.watch.rates import rates
from rawloop.watch.sample import Sample, is_adam, is_plain_sgd, sampled
from rawloop.watch.subject import Detector, StepRecord, Subject

LOST = 0.5  # share; 16-bit weights lose a few small updates at any learning rate
USUAL_LR = 0.5  # times the largest so far: below, a schedule ends, and its updates may be lost
RISING = 1.01  # from one update to the next: a warm-up, whose first updates may be lost
ZERO_HALF, ZERO = 1e-3, 0.5  # share of second moments; each such number gets an update of m / eps
STILL = 0.5  # share of second moments that cannot shrink
DROWNED = 0.5  # share of second moments below eps^2
TOO_FAST_ONCE, TOO_FAST = 1.0, 0.3  # update / weight: once, or at two probes in a row; usual are 1e-4 to 1e-2
TOO_SLOW = 1e-8  # update / weight; float32 has 6e-8
TINY = 1e-4  # rms of a matrix at the start: one that starts near zero moves fast by design
DECAY = 3.0  # weight decay / update; 1 is the balance that weights tend to
DECAY_OF_MOMENT = 0.5  # of Adam's first moment, the part that is not weight decay


class Updates(Detector):
    """Finds updates that rounding loses, second moments that are zero or stand still, and updates of an absurd size.

    It samples weights and state on probing steps, reading the device once for each group and dtype. Optimizers that are
    neither SGD nor keep `exp_avg` and `exp_avg_sq` are not measured.

    Kinds: `updates_lost`, `second_moment_zero`, `second_moment_cannot_move`, `eps_dominates`, `weight_decay_outweighs`,
    `update_too_large`, `update_too_small`.
    """

    def __init__(self) -> None:
        self._lr: dict[str, float] = {}  # of the last update
        self._before: dict[str, float] = {}  # of the update before
        self._largest: dict[str, float] = {}
        self._near_zero: set[str] = set()  # matrices that start near zero
        self._fast: set[str] = set()  # at the last probe
        self._fast_now: set[str] = set()
        self._waiting: list[tuple[str, float, Finding]] = []  # label, lr; dropped if lr rises in the next update
        self._step = -1

    def start(self, subject: Subject) -> Iterable[Finding]:
        """Measure the weights that start near zero."""
        held = held_by_optimizers(subject)
        sizes = rms_of([one.parameter for one in held]) if held else []
        self._near_zero = {one.name for one, rms in zip(held, sizes, strict=True) if rms < TINY}
        return ()

    def gradients(self, subject: Subject, record: StepRecord) -> Iterator[Finding]:
        """Note the learning rates, and measure the updates of SGD without momentum, which are its gradients."""
        if record.step != self._step:
            self._note_rates(subject, record)
            yield from self._release()
            self._fast, self._fast_now = (self._fast_now, set()) if record.probing else (self._fast, self._fast_now)
            if record.probing:
                yield from self._judge(subject, record, sgd=True)
        self._step = record.step

    def end(self, subject: Subject, record: StepRecord) -> Iterator[Finding]:
        """Measure the updates of the other optimizers from their state."""
        if record.probing and record.applied:
            yield from self._judge(subject, record, sgd=False)

    def finish(self, subject: Subject) -> Iterator[Finding]:
        """Tell what no rise of the learning rate explains."""
        yield from self._release(ended=True)

    def _note_rates(self, subject: Subject, record: StepRecord) -> None:
        self._before, self._lr = self._lr, rates(subject, record.probing)
        for label, lr in self._lr.items():
            self._largest[label] = max(lr, self._largest.get(label, 0.0))

    def _release(self, ended: bool = False) -> Iterator[Finding]:
        waiting, self._waiting = self._waiting, []
        for label, lr, finding in waiting:
            if ended or self._lr.get(label, lr) <= RISING * lr:
                yield finding

    def _judge(self, subject: Subject, record: StepRecord, sgd: bool) -> Iterator[Finding]:
        for label, held in by_label(held_by_optimizers(subject)).items():
            chosen = [one for one in held if is_plain_sgd(one) == sgd]
            scale = record.scales.get(id(held[0].optimizer), record.scale) if sgd else 1.0
            for sample in sampled(chosen, self._lr.get(label, 0.0), scale):
                judge = Judge(subject, record, label, sample)
                yield from judge.moments()
                yield from judge.decay()
                yield from self._sizes(judge)
                rising = sample.lr > RISING * self._before.get(label, sample.lr)
                if not rising and sample.lr >= USUAL_LR * self._largest.get(label, 0.0) > 0:
                    self._waiting += [(label, sample.lr, finding) for finding in judge.too_small()]

    def _sizes(self, judge: "Judge") -> Iterator[Finding]:
        for place, one in enumerate(judge.sample.held):
            ratio = judge.sample.ratio(place)
            if one.parameter.ndim < 2 or one.name in self._near_zero or not ratio > TOO_FAST:  # also NaN
                continue
            self._fast_now.add(one.name)
            if ratio > TOO_FAST_ONCE or one.name in self._fast:
                yield judge.too_large(place)


class Judge:
    """Makes findings from a sample of one group."""

    def __init__(self, subject: Subject, record: StepRecord, label: str, sample: Sample) -> None:
        self.subject, self.record, self.label, self.sample = subject, record, label, sample

    def _finding(self, kind: str, what: str, first: int, cause: Cause) -> Finding:
        name = self.sample.held[first].name
        place = Place(phase="update", module=module_of(name), parameter=name, optimizer=self.label)
        cause = Cause(cause.whose, cause.what, place, cause.evidence, cause.advice)
        return Finding(kind, f"{what} ({self.label})", (cause,), self.record.step, self.subject.world.rank)

    def moments(self) -> Iterator[Finding]:
        """Yield findings for second moments that are zero, stand still, or are below eps."""
        sample, options = self.sample, self.sample.held[0].group
        if not is_adam(sample.held[0]):
            return
        dtype = str(sample.state_dtype).removeprefix("torch.")
        evidence: Evidence = {"state dtype": dtype, "beta2": sample.betas[1], "eps": sample.eps}
        limit = ZERO_HALF if sample.state_dtype in HALF else ZERO
        share = sample.share("zero", "active")
        if share > limit:
            what = "squares of small gradients round to zero in the state's dtype, and the update becomes m / eps"
            advice = "Keep float32 state: float32 weights under autocast, or float32 masters"
            cause = Cause("precision", what, evidence=evidence | {"share": share}, advice=advice)
            what = f"{share:.1%} of second moments are zero though their gradients are not"
            yield self._finding("second_moment_zero", what, sample.first("zero", "active", limit), cause)
        share = sample.share("still", "moving")
        if share > STILL:
            what = f"1 - beta2 is below half a unit in the last place of {dtype}: second moments can rise and not fall"
            evidence |= {"1 - beta2": 1 - sample.betas[1], "share": share}
            cause = Cause("precision", what, evidence=evidence, advice="Keep float32 state, or lower beta2 (0.95)")
            what = f"{share:.1%} of second moments cannot shrink"
            yield self._finding("second_moment_cannot_move", what, sample.first("still", "moving", STILL), cause)
        share = sample.share("drowned", "moving")
        if share > DROWNED:
            what = "eps is larger than the root of the second moments, so updates follow the gradients' size as in SGD"
            rms = {"eps": number(options["eps"]), "share of second moments below eps^2": share}
            advice = "Lower eps, or look why the gradients are so small (a loss divided twice)"
            cause = Cause("optimizer", what, evidence=rms, advice=advice)
            first = sample.first("drowned", "moving", DROWNED)
            yield self._finding("eps_dominates", "eps outweighs the second moments", first, cause)

    def decay(self) -> Iterator[Finding]:
        """Yield a finding if weight decay is larger than what the gradients do."""
        sample, options = self.sample, self.sample.held[0].group
        wd = number(options.get("weight_decay", 0.0))
        if not is_adam(sample.held[0]) or wd <= 0 or sample.total("update2") == 0:
            return
        if options.get("decoupled_weight_decay", type(sample.held[0].optimizer).__name__ == "AdamW"):
            ratio = sample.lr * wd * (sample.total("weight2") / sample.total("update2")) ** 0.5
            if not ratio > DECAY:  # also NaN
                return
            what = "weight decay shrinks the weights by more than the gradients move them"
            evidence: Evidence = {"weight_decay": wd, "lr": sample.lr, "decay / update": ratio}
        else:
            rest = (sample.total("pushed2") / sample.total("moment2")) ** 0.5 if sample.total("moment2") else 1.0
            if not rest < DECAY_OF_MOMENT:
                return
            what = "weight decay is added to the gradients before they are normalised, and is most of them"
            evidence = {"weight_decay": wd, "part of the first moment that is not decay": rest}
        cause = Cause("optimizer", what, evidence=evidence, advice="Lower weight_decay; take AdamW in place of Adam")
        yield self._finding("weight_decay_outweighs", "weight decay outweighs the gradients", 0, cause)

    def too_small(self) -> Iterator[Finding]:
        """Yield findings for updates that rounding loses, or that are too small to matter."""
        sample = self.sample
        dtype, share = str(sample.dtype).removeprefix("torch."), sample.share("lost", "active")
        evidence: Evidence = {"lr": sample.lr, "weights' dtype": dtype, "share": share}
        if share > LOST:
            what = f"updates smaller than half a unit in the last place of {dtype} leave the weight as it is"
            advice = "Raise the learning rate"
            if sample.dtype in HALF:
                advice = "Train float32 weights under autocast, or let the optimizer hold float32 masters"
            cause = Cause("precision" if sample.dtype in HALF else "optimizer", what, evidence=evidence, advice=advice)
            first = sample.first("lost", "active", LOST)
            yield self._finding("updates_lost", f"rounding loses {share:.1%} of the updates", first, cause)
            return
        weight, update = sample.total("weight2"), sample.total("update2")
        if weight > 0 and 0 < (update / weight) ** 0.5 < TOO_SLOW:
            what = "the weights hardly move"
            cause = Cause("optimizer", what, evidence=evidence | {"update / weight": (update / weight) ** 0.5})
            yield self._finding("update_too_small", "updates are tiny beside the weights", 0, cause)

    def too_large(self, place: int) -> Finding:
        """Return the finding for a matrix whose update is as large as its weights."""
        ratio = self.sample.ratio(place)
        evidence: Evidence = {"update / weight": ratio, "usual": "1e-4 to 1e-2", "lr": self.sample.lr}
        what = "one update replaces a large part of the weights"
        cause = Cause("optimizer", what, evidence=evidence, advice="Lower the learning rate, or warm it up")
        return self._finding("update_too_large", f"an update is {ratio:.2g} times the weights", place, cause)
