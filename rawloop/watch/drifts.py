"""Slow changes: a loss that diverges, never moves or falls to nothing at once; steps that take longer and longer."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from statistics import fmean, median, pstdev

from torch import Tensor

from rawloop.watch.findings import Cause, Finding, Place
from rawloop.watch.nest import tensors_in
from rawloop.watch.subject import StepRecord, Subject

BLOCK = 25  # steps of which one mean is made
LEAST, EARLY = 20, 100  # steps in which a loss that rises from the start is told
CONSTANT = 50  # steps of the same loss
FLAT_BLOCKS = 8
QUICK, NOTHING = 50, 0.05  # steps in which no language model learns everything; nats per target
SEGMENT, SEGMENTS, GROWTH = 30, 8, 2.0  # steps, segments, times the duration
Near = Callable[[int], Sequence[Cause]]


class Drifts:
    """Follows the loss and the duration of steps over many steps."""

    def __init__(self) -> None:
        self._first: list[float] = []
        self._samples: set[tuple[float, ...]] = set()
        self._moving = True  # whether the learning rate was above zero in all first steps
        self._norms: list[float] = []
        self._block: list[float] = []
        self._means: list[tuple[int, float]] = []  # the first step of a block, and its mean
        self._noises: list[float] = []
        self._seconds: list[float] = []
        self._values: list[int] = []
        self._told: set[str] = set()

    def find(self, subject: Subject, record: StepRecord, lr: float | None, near: Near) -> Iterator[Finding]:
        """Look at the finite loss of an applied step; `near` returns the causes that have jumped before a step."""
        assert record.loss is not None
        if len(self._first) < EARLY:
            yield from self._find_early(subject, record, lr)
        self._block.append(record.loss)
        if len(self._block) == BLOCK:
            self._means.append((record.step - BLOCK + 1, fmean(self._block)))
            self._noises.append(pstdev(self._block))
            self._block = []
            yield from self._find_divergence(subject, record, near)
            yield from self._find_flat(subject, record)
        yield from self._find_growth(subject, record)

    def _once(self, finding: Finding, subject: Subject) -> Iterator[Finding]:
        if finding.kind not in self._told:
            self._told.add(finding.kind)
            finding.rank = subject.world.rank
            yield finding

    def _find_early(self, subject: Subject, record: StepRecord, lr: float | None) -> Iterator[Finding]:
        assert record.loss is not None
        self._first.append(record.loss)
        self._moving &= lr is not None and lr > 0
        self._norms.append(record.grad_norm or 0.0)
        count = len(self._first)
        if count >= LEAST and self._rose():
            yield from self._once(_rising(self._first, self._norms, record, lr, swings(subject, record)), subject)
        if count == CONSTANT and self._moving and max(self._first) - min(self._first) <= 1e-7 * abs(self._first[0]):
            yield from self._once(_constant(self._first, self._norms, record), subject)
        if count <= QUICK and "loss_vanished" not in self._told and (tensor := _tokens(record)) is not None:
            self._samples.add(tuple(tensor.flatten()[:16].tolist()))
            low = count > 5 and median(self._first[-5:]) < NOTHING < 1 < self._first[0]
            if low and len(self._samples) > count // 2:  # a loop that trains on one batch may learn it by heart
                yield from self._once(_vanished(self._first, record), subject)

    def _rose(self) -> bool:
        start, now = max(self._first[:3]), self._first[-5:]
        return min(self._first) > 0 and min(now) > 3 * start and min(now) > 2 * median(self._first)

    def _find_divergence(self, subject: Subject, record: StepRecord, near: Near) -> Iterator[Finding]:
        means = [mean for _, mean in self._means]
        best = min(range(len(means)), key=means.__getitem__)
        later = means[best:]
        rising = len(later) > 3 and all(one < two for one, two in pairwise(later[-4:]))
        if not rising or means[-1] - means[best] < max(2 * median(self._noises), 0.25 * abs(means[best])):
            return
        since = self._means[best][0] + BLOCK
        what = f"the loss rises since about step {since}: its mean was {means[best]:.4g} and is {means[-1]:.4g}"
        evidence = {"best mean": means[best], "mean now": means[-1], "blocks of steps": len(later) - 1}
        advice = "lower the learning rate, or resume from before this step"
        unknown = Cause("not known", "no other number jumped when it began to rise", Place(), evidence, advice)
        causes = tuple(near(since)) or (unknown,)
        finding = Finding("loss_diverges", what, causes, record.step, ordinary=swings(subject, record), since=since)
        yield from self._once(finding, subject)

    def _find_flat(self, subject: Subject, record: StepRecord) -> Iterator[Finding]:
        means = [mean for _, mean in self._means]
        noise = median(self._noises)
        if len(means) != FLAT_BLOCKS or not self._moving or means[0] - min(means) >= 0.4 * noise:
            return
        what = f"the loss is as high as at the start after {len(means) * BLOCK} steps"
        evidence = {"first mean": means[0], "lowest mean": min(means), "deviation": noise}
        advice = "compare the learning rate with what is usual for the model; a loss that is at its floor is healthy"
        cause = Cause("not known", "nothing was learnt that shows in the loss", Place(), evidence, advice)
        yield from self._once(Finding("loss_flat", what, (cause,), record.step, ordinary=True, since=0), subject)

    def _find_growth(self, subject: Subject, record: StepRecord) -> Iterator[Finding]:
        if record.seconds is None:
            return
        self._seconds.append(record.seconds)
        _, tensor = next(tensors_in(record.batch), ("", None))
        self._values.append(tensor.numel() if tensor is not None else 0)
        if len(self._seconds) < SEGMENT * SEGMENTS:
            return
        parts = range(0, SEGMENT * SEGMENTS, SEGMENT)
        times = [median(self._seconds[start : start + SEGMENT]) for start in parts]
        longer = median(self._values[-SEGMENT:]) > 1.2 * median(self._values[:SEGMENT])
        self._seconds, self._values = [], []
        steady = all(two > 1.02 * one for one, two in pairwise(times))
        if steady and times[-1] > GROWTH * times[0] and not longer:
            what = f"steps take longer and longer: {times[0]:.3g} s, and {times[-1]:.3g} s after {parts.stop} steps"
            evidence = {"seconds before": times[0], "seconds now": times[-1]}
            advice = "look for losses kept with their graph (use .detach()), and for hooks that each step registers"
            cause = Cause("not known", "something grows in each step", Place(), evidence, advice)
            since = record.step - parts.stop + 1
            yield from self._once(Finding("step_time_grows", what, (cause,), record.step, since=since), subject)


def swings(subject: Subject, record: StepRecord) -> bool:
    """Whether the loss is a sum of several that work against each other, as in a GAN, where a rise may be healthy.

    That is so with several optimizers, and with backward passes of losses for which the model was not called again.
    """
    return len(subject.optimizers) > 1 or record.facts.backwards > record.facts.calls > 0


def _tokens(record: StepRecord) -> Tensor | None:
    """Return the first sequence of ids in a batch on the host."""
    found = (tensor for _, tensor in tensors_in(record.batch) if tensor.dtype.itemsize >= 4 and tensor.dim() == 2)
    chosen = (t for t in found if not t.is_floating_point() and t.shape[1] > 1 and t.device.type == "cpu")
    return next(chosen, None)


def _rising(first: list[float], norms: list[float], record: StepRecord, lr: float | None, ordinary: bool) -> Finding:
    what = f"the loss rises from the start: {first[0]:.4g} at first, {first[-1]:.4g} at step {record.step}"
    evidence = {"first norm": norms[0], "norm": norms[-1], "lr": lr if lr is not None else "unknown"}
    steep = Cause("optimizer", "the learning rate is too high", Place("update"), evidence, "divide it by 10")
    sign = Cause("loss", "the loss has the wrong sign", Place(), {}, "check the sign of each of its terms")
    return Finding("loss_diverges", what, (steep, sign), record.step, ordinary=ordinary, since=0)


def _constant(first: list[float], norms: list[float], record: StepRecord) -> Finding:
    what = f"the loss is exactly {first[0]:.6g} in all of the first {len(first)} steps"
    evidence = {"norm": norms[-1]}
    if max(norms) > 0:
        advice = "check that the optimizer holds the weights that the loss depends on"
        cause = Cause("optimizer", "the updates do not reach the loss", Place("update"), evidence, advice)
    else:
        advice = "check requires_grad, detach() and no_grad() between the weights and the loss"
        cause = Cause("model", "no gradient reaches a weight", Place("backward"), evidence, advice)
    return Finding("loss_constant", what, (cause,), record.step, since=0)


def _vanished(first: list[float], record: StepRecord) -> Finding:
    what = f"the loss of a language model fell from {first[0]:.4g} to {median(first[-5:]):.2g} in {len(first)} steps"
    advice = "shift the labels by one, and check that attention is causal"
    leak = Cause("data", "predictions see their own targets", Place("data"), {"steps": len(first)}, advice)
    return Finding("loss_vanished", what, (leak,), record.step)
