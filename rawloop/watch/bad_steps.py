"""Steps whose loss or gradients are not finite: each row of them is traced and kept once."""

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from rawloop.origin import damaged
from rawloop.watch.findings import Finding
from rawloop.watch.guard import Guard, guarded
from rawloop.watch.keeping import Keeper
from rawloop.watch.subject import StepRecord, Subject
from rawloop.watch.tracer import trace

KEEPING = "the flight recorder"


class BadSteps:
    """Follows a row of bad steps.

    Args:
        subject: the objects under watch.
        keeper: writes capsules; None without a folder.
        add: takes findings.
        tell: takes lines for the user.
    """

    def __init__(
        self,
        subject: Subject,
        keeper: Keeper | None,
        add: Callable[[Iterable[Finding]], None],
        tell: Callable[[str], None],
    ) -> None:
        self.subject, self.keeper, self.add, self.tell = subject, keeper, add, tell
        self.streak = 0  # bad steps in a row
        self.damage = ""  # what is wrong with the weights after an update that was not finite
        self._kept = False  # there is a capsule of this row
        self._traces = 0

    @property
    def guard(self) -> Guard:
        """Keeps errors from the loop."""
        return self.subject.guard

    @guarded(KEEPING)
    def start(self) -> None:
        """Start the flight recorder."""
        if self.keeper is not None:
            self.keeper.start()

    @guarded(KEEPING)
    def ended(self, record: StepRecord) -> None:
        """Remember a step that has ended."""
        if self.keeper is not None:
            self.keeper.ended(record)

    @guarded("the tracer of numbers that are not finite")
    def trace(self, record: StepRecord) -> None:
        """Run a step again to find the place: the first two of a row, and not too often."""
        self.streak += 1
        self._kept &= self.streak > 1
        if not self.damage and self.streak <= 2 and self._traces < 4 + record.step // 500:
            self._traces += 1
            self.add(trace(self.subject, record))

    @guarded(KEEPING)
    def keep(
        self, record: StepRecord, alarms: Iterable[Finding], losses: Sequence[tuple[Tensor, bool]], failed: bool = False
    ) -> None:
        """Write a capsule if an alarm asks for one, once in a row of bad steps. The update has not been made yet."""
        if self.keeper is None or not self.keeper.why:
            return
        if self.streak and self._kept:
            self.keeper.why = ""
            return
        line = self.keeper.keep(record, alarms, [root for root, _ in losses], failed)
        self._kept = self.streak > 0
        if line:
            self.tell(line)

    @guarded("the look at damaged weights")
    def look_for_damage(self, step: int) -> None:
        """Keep quiet while an update that was not finite has left weights that are not: all else follows from them."""
        found, before = damaged(self.subject.model), self.damage
        self.damage = str(found) if found is not None else ""
        if found is not None and not before:
            self.tell(f"step {step}: {found}. No other finding is told until the weights are finite again")
        elif before and found is None:
            self.tell(f"step {step}: the weights are finite again")
