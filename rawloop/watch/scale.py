"""The loss scale: whether there is one, its history in every skip, and the window of scales that fit."""

import math
from collections.abc import Iterable, Iterator

from rawloop.watch.findings import Cause, Finding, Place, Whose
from rawloop.watch.look import Look, Seen
from rawloop.watch.measure import MOST_FLUSHED, Exponents, joined
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
ORDINARY = ("scale_search", "scale_backs_off")
TOO_LARGE = ("scale_collapses", "skips_in_a_row")
LARGE_LOSS = 1e3


class LossScale(Detector):
    """Looks at the loss scale of a loop, in every skip and in every look."""

    def __init__(self, look: Look | None = None) -> None:
        self.look = look or Look()
        self._recent: list[bool] = []  # whether each of the last steps was skipped, from the first update on
        self._steps = self._skips = self._in_a_row = 0
        self._since = 0  # the first of the skips in a row
        self._first = 1.0  # scale
        self._history: list[float] = []  # scales after the last skips
        self._found: dict[str, Finding] = {}

    def start(self, subject: Subject) -> Iterable[Finding]:
        """Read the first scale."""
        self._first = subject.loss_scale()
        return ()

    def batch(self, subject: Subject, record: StepRecord) -> Iterable[Finding]:
        """Begin the look."""
        self.look.begin(subject, record)
        return ()

    def gradients(self, subject: Subject, record: StepRecord) -> Iterable[Finding]:
        """Measure the gradients."""
        self.look.gradients(subject, record)
        return ()

    def end(self, subject: Subject, record: StepRecord) -> Iterable[Finding]:
        """Judge a skip, and what the look has seen."""
        if record.applied is not None:
            yield from self._count(subject, record)
        seen = self.look.seen(record)
        if seen is not None and seen.complete and seen.fp16:
            yield from self._window(subject, seen)

    def finish(self, subject: Subject) -> Iterable[Finding]:
        """Take the hooks off."""
        self.look.stop()
        return ()

    def _count(self, subject: Subject, record: StepRecord) -> Iterator[Finding]:
        skipped = not record.applied
        self._steps += 1
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        self._skips += skipped
        if self._recent or not skipped:
            self._recent = [*self._recent[1 - RECENT :], skipped]
        if skipped and self._in_a_row == 1:
            self._since = record.step
        if skipped and subject.is_scaled:  # a skip has waited for the device already
            yield self._skip(subject, record, subject.loss_scale())

    def _skip(self, subject: Subject, record: StepRecord, scale: float) -> Finding:
        """Return the finding of a skip: the scale, its start and its history."""
        self._history = [*self._history[-7:], scale]
        evidence: dict[str, float | int | str] = {
            "scale": scale,
            "floor": getattr(getattr(subject.scaler, "config", None), "floor", "none"),
            "first scale": self._first,
            "last scales": " ".join(f"{value:g}" for value in self._history),
            "skips in a row": self._in_a_row,
            "skips": self._skips,
            "steps": self._steps,
        }
        halvings = math.log2(self._first / scale) if scale > 0 else math.inf
        kind, whose, what, advice = self._judge(scale, halvings, record.loss)
        causes = [Cause(whose, what, Place("backward"), evidence, advice)]
        if kind in TOO_LARGE and record.loss is not None and abs(record.loss) > LARGE_LOSS:
            what = f"the loss is {record.loss:.4g}, too large to be multiplied by any scale"
            advice = "Take the mean over targets in place of the sum"
            causes.insert(0, Cause("loss", what, Place("backward"), {"loss": record.loss, **evidence}, advice))
        made = Finding(
            kind,
            "updates were skipped, for their gradients are not finite",
            tuple(causes),
            record.step,
            subject.world.rank,
            ordinary=kind in ORDINARY,
            since=self._since,
        )
        self._found.setdefault(kind, made).causes = made.causes  # told once, with the history of the last skip
        return made

    def _judge(self, scale: float, halvings: float, loss: float | None) -> tuple[str, Whose, str, str]:
        """Return the kind of a skip, whose fault it is, what it means and what to do."""
        begun, often = bool(self._recent), sum(self._recent) / max(len(self._recent), 1)
        if scale <= DENORMAL:
            what = f"1 / {scale:.3g} overflows float32, so the first good step divides by zero and poisons the weights"
            advice = "Stop, and give the scaler a floor of 1; restart from a checkpoint"
            return "scale_denormal", "precision", what, advice
        if loss is not None and (math.isnan(loss) or (math.isinf(loss) and begun)):
            what = f"the loss itself is {loss}, which no loss scale can mend"
            advice = "Look for the origin in the data and the model, not in the scaler"
            return "skip_of_bad_loss", "not known", what, advice
        if scale < 1 or halvings >= MANY_HALVINGS:
            what = f"the scale was halved {halvings:.0f} times: FP16 holds the gradients at no scale"
            advice = "Look for the module that overflows; a smaller scale only flushes"
            return "scale_collapses", "precision", what, advice
        if self._in_a_row >= MANY_IN_A_ROW and (begun or halvings < self._in_a_row / 2):
            what = f"{self._in_a_row} steps in a row were skipped, and the scale does not help"
            advice = "Look for the module that overflows, and lower the learning rate"
            return "skips_in_a_row", "precision", what, advice
        if often > MOST_SKIPPED and len(self._recent) >= (RECENT if often < MANY_SKIPPED else RECENT // 5):
            what = f"{often:.0%} of the last {len(self._recent)} steps were skipped: the scale grows too soon"
            return "skips_often", "precision", what, "Raise the scaler's growth_interval (2000 is usual)"
        if not begun or self._steps <= FIRST_STEPS:
            what = "a loss scaler starts high and halves its scale until the gradients are finite"
            return "scale_search", "precision", what, ""
        return "scale_backs_off", "precision", "the scale had grown, and one step later it is halved again", ""

    def _window(self, subject: Subject, seen: Seen) -> Iterator[Finding]:
        grads = [g for name, g in seen.gradients.items() if g is not None and g.rows and seen.in_fp16(name)]
        true = joined(grads).shifted(-round(math.log2(seen.left)))
        if true.window() is None:
            return
        lost = sum(grad.lost * grad.exponents.nonzero for grad in grads) / true.nonzero
        small = true.subnormal(seen.loss_scale)
        if subject.scaler is not None and not subject.is_scaled:
            kind = "scaler_disabled"
        elif subject.scaler is None and seen.loss_scale == 1:
            kind = "no_loss_scaling"
        elif lost > MOST_LOST or small > MOST_SUBNORMAL:
            kind = "scale_too_low"
        else:
            return
        if kind not in self._found:
            self._found[kind] = _outside(subject, seen, kind, true, lost, small)
            yield self._found[kind]


def _outside(subject: Subject, seen: Seen, kind: str, true: Exponents, lost: float, small: float) -> Finding:
    """Return the finding of a scale that is below its window, or of none."""
    window = true.window()
    assert window is not None
    flushed = f"FP16 rounds {lost:.1%} of the gradients to zero, and {small:.1%} of the others are subnormal"
    what, advice = {
        "scaler_disabled": (
            f"the GradScaler is disabled and scales nothing: {flushed}",
            "Build it with enabled=True for the device that the model runs on",
        ),
        "no_loss_scaling": (
            f"the model computes in FP16 and nothing scales the loss: {flushed}",
            "Use torch.amp.GradScaler, or bfloat16, which needs none",
        ),
        "scale_too_low": (f"a loss scale of {seen.loss_scale:g} is too low: {flushed}", "Raise the loss scale"),
    }[kind]
    room = window.high - math.log2(seen.loss_scale)
    scales = str(window) if lost < MOST_FLUSHED else f"up to 2^{window.high}"  # what is flushed is not seen
    fits = (
        f"start at {window.recommended():.9g}" if room >= 1 else "a larger one would overflow: use bfloat16 or float32"
    )
    cause = Cause(
        "precision",
        what,
        Place("backward"),
        {"lost": lost, "subnormal": small, "loss scale": seen.loss_scale, "scales that fit": scales},
        f"{advice}; {fits}",
    )
    symptom = {
        "scaler_disabled": "the loss scaler is disabled",
        "no_loss_scaling": "FP16 without a loss scale",
        "scale_too_low": "the loss scale is too low",
    }[kind]
    harmless = kind == "no_loss_scaling" and lost < LEAST_LOST and small < LEAST_SUBNORMAL
    harmless = harmless or (kind == "scale_too_low" and room < 1)
    return Finding(kind, symptom, (cause,), seen.step, subject.world.rank, ordinary=harmless)
