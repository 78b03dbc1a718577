"""The wait for data before each step: a loader that is slower than the model, or has become slow."""

from collections.abc import Iterator

from rawloop.watch.findings import Cause, Finding, Place
from rawloop.watch.history import History
from rawloop.watch.subject import StepRecord, Subject

MOST = 0.5  # share of the time
LONG, LEAST = 10.0, 0.02  # times the usual wait; seconds, below which the scheduler of the host makes waits
STEPS = 3  # one after the other: an evaluation, a checkpoint or the begin of an epoch is one long wait


class Waits:
    """Compares the wait for data with the step's duration, and with its own history."""

    def __init__(self) -> None:
        self._shares, self._usual = History(least=50), History(least=10)
        self._long: list[float] = []

    def find(self, subject: Subject, record: StepRecord) -> Iterator[Finding]:
        """Look at the wait of a step whose duration is known."""
        if record.data_seconds is None or record.seconds is None:
            return
        wait, rank = record.data_seconds, subject.world.rank
        share = wait / max(wait + record.seconds, 1e-9)
        usual = self._usual.median if self._usual.is_known else float("inf")
        if share > MOST and wait >= max(LONG * usual, LEAST):
            self._long.append(wait)
        else:
            self._long.clear()
            self._usual.add(wait)
        if len(self._long) == STEPS:
            yield _slowed(record, self._long, usual, share, rank)
        self._shares.add(share)
        if self._shares.is_known and self._shares.median > MOST:
            what = f"{self._shares.median:.0%} of the time is a wait for data"
            evidence = {"share of the time": self._shares.median, "seconds": wait}
            cause = Cause("data", "the loader is slower than the model", Place("data"), evidence, "use more workers")
            yield Finding("data_slow", what, (cause,), record.step, rank, ordinary=True)


def _slowed(record: StepRecord, waits: list[float], usual: float, share: float, rank: int) -> Finding:
    since = record.step - len(waits) + 1
    what = f"the wait for data has grown from {usual:.3g} s to {min(waits):.3g} s and more, since {len(waits)} steps"
    evidence = {"usual seconds": usual, "seconds": waits[-1], "share of the time": share}
    place = Place("data", sample=", ".join(record.ids[:4]))
    advice = "look at what the loader reads since then: another file, disk or network, or a worker that has ended"
    slow = Cause("data", "reading or preparing a batch has become slow", place, evidence, advice)
    advice = "look at the load of disk, network and CPU, and at the code between two steps"
    other = Cause("hardware", "something else uses the disk, the network or the CPU", Place("data"), {}, advice)
    return Finding("data_slowed", what, (slow, other), record.step, rank, since=since)
