"""The duration of steps, and the wait for data before each: what has become slow, and a loader that always was."""

from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from statistics import median

from rawloop.watch.findings import Cause, Finding, Place
from rawloop.watch.history import History
from rawloop.watch.nest import tensors_in
from rawloop.watch.subject import StepRecord, Subject

BLOCK, BLOCKS = 30, 8  # steps of which one median is made; such medians
SLOW, GROWTH = 3.0, 2.0  # times the duration of some blocks ago, at once or little by little
LONGER = 1.2  # times the values in a batch: longer steps are then no wonder
MOST = 0.5  # share of the time that is a wait for data
LONG, LEAST = 10.0, 0.1  # times the usual wait; seconds, below which a wait is nobody's concern
WAITS = 3  # one after the other: an evaluation, a checkpoint or the begin of an epoch is one long wait


class Times:
    """Compares the durations of steps and the waits for data with their own history."""

    def __init__(self) -> None:
        self._block: list[tuple[float, float, int]] = []  # seconds, share of the wait, values in the batch
        self._blocks: deque[tuple[float, int]] = deque(maxlen=BLOCKS)  # medians of seconds and values
        self._usual = History(least=10)  # waits
        self._long: list[float] = []

    def find(self, subject: Subject, record: StepRecord) -> Iterator[Finding]:
        """Look at a step whose duration is known."""
        if record.seconds is None:
            return
        wait = record.data_seconds or 0.0
        share = wait / max(wait + record.seconds, 1e-9)
        if record.data_seconds is not None:
            yield from self._find_long(subject, record, wait, share)
        _, tensor = next(tensors_in(record.batch), ("", None))
        self._block.append((record.seconds, share, 0 if tensor is None else tensor.numel()))
        if len(self._block) == BLOCK:
            seconds, waits, values = zip(*self._block, strict=True)
            self._blocks.append((median(seconds), median(values)))
            self._block = []
            yield from self._find_slow(subject, record, median(waits))

    def _find_long(self, subject: Subject, record: StepRecord, wait: float, share: float) -> Iterator[Finding]:
        usual = self._usual.median if self._usual.is_known else float("inf")
        if share > MOST and wait >= max(LONG * usual, LEAST):
            self._long = [*self._long[:WAITS], wait]
        else:
            self._long = []
            self._usual.add(wait)
        if len(self._long) == WAITS:
            what = f"the wait for data has grown from {usual:.3g} s to {min(self._long):.3g} s and more"
            place = Place("data", sample=", ".join(record.ids[:4]))
            evidence = {"usual seconds": usual, "seconds": wait, "share of the time": share}
            advice = "look at what the loader reads now: another file, disk or network, or a worker that has ended"
            slow = Cause("data", "reading or preparing a batch has become slow", place, evidence, advice)
            advice = "look at the load of disk, network and CPU, and at the code between two steps"
            other = Cause("hardware", "something else uses the disk, the network or the CPU", Place("data"), {}, advice)
            since = record.step - WAITS + 1
            yield Finding("data_slow", what, (slow, other), record.step, subject.world.rank, since=since)

    def _find_slow(self, subject: Subject, record: StepRecord, share: float) -> Iterator[Finding]:
        times, sizes = zip(*self._blocks, strict=True)
        if share > MOST:
            what = f"{share:.0%} of the time is a wait for data"
            evidence = {"share of the time": share}
            cause = Cause("data", "the loader is slower than the model", Place("data"), evidence, "use more workers")
            yield Finding("data_slow", what, (cause,), record.step, subject.world.rank, ordinary=True)
        steady = len(times) == BLOCKS and all(two > 1.02 * one for one, two in pairwise(times))
        if times[-1] > (GROWTH if steady else SLOW) * times[0] and sizes[-1] <= LONGER * sizes[0]:
            why, advice = "steps have become slower", "look at clocks and other processes"
            if steady:
                why = "something grows in each step"
                advice = "look for losses kept with their graph (use .detach()), and for hooks that each step registers"
            evidence = {"seconds before": times[0], "seconds now": times[-1]}
            cause, first = Cause("not known", why, Place(), evidence, advice), record.step - len(times) * BLOCK + 1
            what = f"a step takes {times[-1]:.3g} s, and took {times[0]:.3g} s in the steps after {first}"
            rank, since = subject.world.rank, first if steady else None
            yield Finding("steps_slower", what, (cause,), record.step, rank, not steady, since)
