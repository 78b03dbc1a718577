"""Who waits for whom: when a rank does not come to an agreement in time, the others can say which one it was.

The hot path costs nothing: a rank that has waited for a while leaves a mark in the store through which the ranks have
met. Whoever has left none when the time is over did not come.
"""

import json
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from threading import Thread
from typing import Any

from rawloop.errors import LostRank

PATIENCE = 5.0  # seconds that a rank waits before it leaves a mark
ANSWER = 10.0  # seconds in which the store answers, if its host is there


class Waiting:
    """One rank's marks, and what it reads of the others'.

    Args:
        store: of torch.distributed.
        rank: this process's.
        size: number of ranks.
        timeout: seconds that a collective may wait (ddp.timeout).
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: float) -> None:
        self.store, self.rank, self.size, self.timeout = store, rank, size, timeout
        self.patience = min(PATIENCE, timeout / 4)
        self.agreement = 0  # number of the agreement that this rank has come to

    def finish(self, work: Any) -> None:
        """Wait for a collective that was begun; leave a mark if it takes long.

        Raises:
            RuntimeError: it failed, or somebody did not come in time.
        """
        self.agreement += 1
        try:
            work.wait(timedelta(seconds=self.patience))
        except RuntimeError:
            if work.is_completed():  # failed; else it only takes long
                raise
            self._mark(out_of_time=False)
            work.wait()

    def explain(self, error: Exception) -> LostRank:
        """Make of a collective's error what this rank knows of its cause. Waits a little for the others' marks."""
        out_of_time = "Timed out" in str(error) or "timed out" in str(error)
        self._mark(out_of_time)
        if out_of_time:  # who came just before the time was over has not left a mark yet
            time.sleep(self.patience + 1)
        marks = self._read()
        if out_of_time and self.rank not in marks:  # not even its own: the store has ended with its host
            rest = "which one is not known here, the message of the rank that ended first says it"
            return LostRank(f"a rank did not come in time, within {self.timeout:g} s (ddp.timeout); {rest}")
        waited = [rank for rank, mark in marks.items() if mark["out_of_time"]]
        if out_of_time:
            return self._nobody_came(marks)
        if waited:
            whom = f"rank {waited[0]} had waited {self.timeout:g} s for it (ddp.timeout) and has ended"
            return LostRank(f"rank {self.rank} came too late: {whom}")
        return LostRank(f"another rank has ended, and its message says why ({str(error).splitlines()[0]})")

    def _nobody_came(self, marks: Mapping[int, Mapping[str, Any]]) -> LostRank:
        here = {r for r, mark in marks.items() if mark["out_of_time"] or mark["agreement"] == self.agreement}
        here.add(self.rank)
        missing = sorted(set(range(self.size)) - here)
        if missing:
            names = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
            what = f"{names} did not come in time: the others waited {self.timeout:g} s (ddp.timeout)"
            advice = "look what held it there; if it was only slow (loading a model, a long save), raise ddp.timeout"
        else:
            what = f"the ranks waited {self.timeout:g} s (ddp.timeout) for each other, and none was missing"
            advice = "look whether the network between them carries data, and raise ddp.timeout if it is only slow"
        error = LostRank(f"{what}: {advice}")
        error.is_reporter = self.rank == min(here)
        return error

    def _mark(self, out_of_time: bool) -> None:
        content = json.dumps({"agreement": self.agreement, "out_of_time": out_of_time})
        self._try(lambda: self.store.set(f"waiting-{self.rank}", content))

    def _read(self) -> dict[int, dict[str, Any]]:
        marks: dict[int, dict[str, Any]] = {}

        def read() -> None:
            for rank in range(self.size):
                if self.store.check([f"waiting-{rank}"]):
                    marks[rank] = json.loads(self.store.get(f"waiting-{rank}"))

        self._try(read)
        return dict(marks)

    def _try(self, work: Callable[[], None]) -> None:
        """Speak with the store, whose host may have gone: in a thread that nobody waits for longer than a while."""

        def attempt() -> None:
            with suppress(RuntimeError, OSError):  # the host has gone: what it knew is not known
                self._knock()
                work()

        thread = Thread(target=attempt, daemon=True)
        thread.start()
        thread.join(ANSWER)

    def _knock(self) -> None:
        """Fail where nobody listens any more: torch's own attempts would print pages of C++ frames."""
        store = self.store
        while hasattr(store, "underlying_store"):
            store = store.underlying_store
        if hasattr(store, "host"):
            socket.create_connection((store.host, store.port), timeout=1).close()
