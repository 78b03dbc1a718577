"""The loss scale: whether there is one, its history in every skip, and the window of scales that fit."""

import math
from collections import deque
from collections.abc import Iterable, Iterator

from rawloop.watch.findings import Cause, Finding, Place, Whose
from rawloop.watch.look import Look, Seen
from rawloop.watch.measure import MOST_FLUSHED, joined
from rawloop.watch.subject import Detector, StepRecord, Subject

DENORMAL = 2.0**-126  # 1 / scale overflows float32 below it
FIRST_STEPS = 100  # in which a scaler looks for its scale
MANY_IN_A_ROW = 10
MANY_HALVINGS = 30
RECENT = 100  # steps over which skips are counted, from the first update on
MOST_SKIPPED, MANY_SKIPPED = 0.05, 0.25  # shares of them; the second is judged after a fifth of these steps
MOST_LOST = 0.05  # share of gradients that a good loss scale may flush to zero, those of rare tokens included
MOST_SUBNORMAL = 0.5
LEAST_LOST, LEAST_SUBNORMAL = 0.01, 0.05  # without a loss scale, smaller shares are harmless
ROOM = 4  # bits by which a scale must be able to grow before it is too low for a single parameter
LARGE_LOSS = 1e3
USUAL = "scale_search"  # the kind of skips that are ordinary


class LossScale(Detector):
    """Looks at the loss scale of a loop, in every skip and in every look."""

    def __init__(self, look: Look) -> None:
        self.look = look
        self._told: set[str] = set()
        self._recent: deque[bool] = deque(maxlen=RECENT)  # the last steps, from the first update on: skipped?
        self._steps = self._skips = self._in_a_row = 0
        self._since = 0  # the first of the skips in a row
        self._first = 1.0  # scale
        self._history: deque[float] = deque(maxlen=8)  # scales after the last skips
        self._found: dict[str, Finding] = {}

    def start(self, subject: Subject) -> Iterable[Finding]:
        """Read the first scale."""
        self._first = subject.loss_scale()
        return ()

    def end(self, subject: Subject, record: StepRecord) -> Iterable[Finding]:
        """Judge a skip, and what the look has seen."""
        if record.applied is not None:
            skipped = not record.applied
            self._steps += 1
            self._skips += skipped
            self._in_a_row = self._in_a_row + 1 if skipped else 0
            self._since = record.step if self._in_a_row == 1 else self._since
            if self._recent or not skipped:
                self._recent.append(skipped)
            if skipped and subject.is_scaled:  # a skip has waited for the device already
                yield self._skip(subject, record, subject.loss_scale())
        seen = self.look.seen(record)
        if seen is not None and seen.complete and seen.fp16:
            yield from self._window(subject, seen)

    def _skip(self, subject: Subject, record: StepRecord, scale: float) -> Finding:
        """Return the finding of a skip: the scale, its start and its history."""
        self._history.append(scale)
        evidence: dict[str, float | int | str] = {
            "scale": scale,
            "floor": getattr(getattr(subject.scaler, "config", None), "floor", "none"),
            "first scale": self._first,
            "last scales": " ".join(f"{value:g}" for value in self._history),
            "skips in a row": self._in_a_row,
            "skips": self._skips,
            "steps": self._steps,
        }
        kind, whose, what, advice = self._judge(scale, record.loss)
        causes = [Cause(whose, what, Place("backward"), evidence, advice)]
        stuck = kind == "scale_collapses" or (kind == "skips_often" and self._in_a_row >= MANY_IN_A_ROW)
        if stuck and record.loss is not None and abs(record.loss) > LARGE_LOSS:
            what = f"the loss is {record.loss:.4g}, too large to be multiplied by any scale"
            advice = "Take the mean over targets in place of the sum"
            causes.insert(0, Cause("loss", what, Place("backward"), {"loss": record.loss, **evidence}, advice))
        what, rank, ordinary = (
            "updates were skipped, for their gradients are not finite",
            subject.world.rank,
            kind == USUAL,
        )
        made = Finding(kind, what, tuple(causes), record.step, rank, ordinary, self._since)
        self._found.setdefault(kind, made).causes = made.causes  # told once, with the history of the last skip
        return made

    def _judge(self, scale: float, loss: float | None) -> tuple[str, Whose, str, str]:
        """Return the kind of a skip, whose fault it is, what it means and what to do."""
        begun, often = bool(self._recent), sum(self._recent) / max(len(self._recent), 1)
        halvings = math.log2(self._first / scale) if scale > 0 else math.inf
        if loss is not None and (math.isnan(loss) or (math.isinf(loss) and begun)) and scale > DENORMAL:
            what = f"the loss itself is {loss}, which no loss scale can mend"
            advice = "Look for the origin in the data and the model, not in the scaler"
            return "skip_of_bad_loss", "not known", what, advice
        if scale < 1 or halvings >= MANY_HALVINGS:
            what = f"the scale was halved {halvings:.0f} times: FP16 holds the gradients at no scale"
            advice = "Look for the module that overflows; a smaller scale only flushes"
            if scale <= DENORMAL:
                what = f"1 / {scale:.3g} overflows float32: the first good step divides by zero and poisons the weights"
                advice = "Stop, and give the scaler a floor of 1; restart from a checkpoint"
            return "scale_collapses", "precision", what, advice
        if self._in_a_row >= MANY_IN_A_ROW and (begun or halvings < self._in_a_row / 2):
            what = f"{self._in_a_row} steps in a row were skipped, and the scale does not help"
            return "skips_often", "precision", what, "Look for the module that overflows, and lower the learning rate"
        if often > MOST_SKIPPED and len(self._recent) >= (RECENT if often < MANY_SKIPPED else RECENT // 5):
            what = f"{often:.0%} of the last {len(self._recent)} steps were skipped: the scale grows too soon"
            return "skips_often", "precision", what, "Raise the scaler's growth_interval (2000 is usual)"
        what = "the scale had grown, and one step later it is halved again"
        if not begun or self._steps <= FIRST_STEPS:
            what = "a loss scaler starts high and halves its scale until the gradients are finite"
        return USUAL, "precision", what, ""

    def _window(self, subject: Subject, seen: Seen) -> Iterator[Finding]:
        """Judge a scale that is below its window, or none."""
        grads = {name: g for name, g in seen.gradients.items() if g is not None and g.rows and seen.in_fp16(name)}
        true = joined(grads.values()).shifted(-round(math.log2(seen.left)))
        window = true.window()
        if window is None:
            return
        lost = sum(grad.lost * grad.exponents.nonzero for grad in grads.values()) / true.nonzero
        small, room = true.subnormal(seen.loss_scale), window.high - math.log2(seen.loss_scale)
        most, name = max((grad.lost, name) for name, grad in grads.items())
        flushes = most > MOST_LOST and room >= ROOM
        place = Place("backward", name.rpartition(".")[0], name) if flushes else Place("backward")
        unscaled = not subject.is_scaled and seen.loss_scale == 1
        harmless = room < 1
        if unscaled:
            harmless = subject.scaler is None and lost < LEAST_LOST and small < LEAST_SUBNORMAL and not flushes
        kind = "no_loss_scaling" if unscaled else "scale_too_low"
        wrong = unscaled or flushes or lost > MOST_LOST or small > MOST_SUBNORMAL
        if kind in self._told or not wrong:
            return
        self._told.add(kind)
        scales = str(window) if lost < MOST_FLUSHED else f"up to 2^{window.high}"  # what is flushed is not seen
        larger = "a larger one would overflow: use bfloat16 or float32"
        start = f"start at {window.recommended():.9g}" if room >= 1 else larger
        what, symptom, advice = _words(subject, seen.loss_scale, unscaled)
        what += f": FP16 rounds {lost:.1%} of the gradients to zero, and {small:.1%} of the others are subnormal"
        evidence = {"lost": lost, "most lost": most, "subnormal": small, "loss scale": seen.loss_scale}
        cause = Cause("precision", what, place, {**evidence, "scales that fit": scales}, f"{advice}; {start}")
        yield Finding(kind, symptom, (cause,), seen.step, subject.world.rank, ordinary=harmless)


def _words(subject: Subject, scale: float, unscaled: bool) -> tuple[str, str, str]:
    """Return what is wrong with a scale, the symptom, and what to do."""
    if not unscaled:
        return f"a loss scale of {scale:g} is too low", "the loss scale is too low", "Raise the loss scale"
    if subject.scaler is None:
        advice = "Use torch.amp.GradScaler, or bfloat16, which needs none"
        return "the model computes in FP16 and nothing scales the loss", "FP16 without a loss scale", advice
    advice = "Build it with enabled=True for the device that the model runs on"
    return "the GradScaler is disabled and scales nothing", "the loss scaler is disabled", advice
