"""The spike guard: whether a step's loss or gradient norm stands out of its own recent history, before its update."""

from rawloop.errors import first_few
from rawloop.watch.findings import Cause, Finding, Place
from rawloop.watch.history import History
from rawloop.watch.subject import StepRecord

NORM_FACTOR, NORM_Z = 2.0, 8.0  # of the largest norm; robust standard deviations above the median


class SpikeGuard:
    """Compares a step's numbers with those of the last applied steps. Steps that stand out do not join the history.

    Before there are 20, nothing stands out.
    """

    def __init__(self) -> None:
        self.loss, self.norm = History(), History()

    def objection(self, loss: float, grad_norm: float) -> str | None:
        """Return why a step with these finite numbers stands out, or None."""
        if self.loss.stands_out(loss):
            return f"the loss {loss:.4g} is a spike: {_usual(self.loss, loss)}"
        out = self.norm.is_known and grad_norm > NORM_FACTOR * self.norm.largest
        if out and self.norm.zscore(grad_norm) > NORM_Z:
            return f"the gradient norm {grad_norm:.4g} is a spike: {_usual(self.norm, grad_norm)}"
        return None

    def keep(self, loss: float, grad_norm: float) -> None:
        """Add the numbers of a step that was applied."""
        self.loss.add(loss)
        self.norm.add(grad_norm)


def spiked(reason: str, record: StepRecord, rank: int, kept: bool = True) -> Finding:
    """Return the finding of a spike, whose samples are the first that one looks at. `kept`: a capsule may hold it."""
    replay = "; `rawloop replay` with --bisect shows which sample weighs most" if kept else ""
    cause = Cause(
        "data",
        "the samples of this step are unlike those before, or the update before it was too large",
        Place(sample=first_few(record.ids), rank=rank),
        {"loss": record.loss or 0.0, "gradient norm": record.grad_norm or 0.0},
        f"Look at the samples, and at the learning rate{replay}",
    )
    return Finding("spike", reason, (cause,), record.step, rank)


def _usual(history: History, value: float) -> str:
    usual = f"the last {len(history)} were {history.smallest:.4g} to {history.largest:.4g}, median {history.median:.4g}"
    return f"{usual}, and it is {history.zscore(value):.3g} robust deviations above"
