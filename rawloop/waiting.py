"""Lost ranks: how long a rank waits for the others, which one did not come, and which errors mean that one has gone.

A rank that waits for a while leaves a mark in the store through which the ranks have met; a rank without a mark did not
come. A rank that works for long says so there, and the others go on waiting. The hot path touches no store.
"""

import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Event, Thread
from typing import Any

import torch.distributed as dist

from rawloop.errors import LostRank

PATIENCE = 5.0  # seconds that a rank waits before it leaves a mark, and between two signs of one that works
ANSWER = 10.0  # seconds in which the store answers, if its host is there

# Errors of gloo and NCCL on a rank that is sound itself. NCCL's text for its own timeout says nothing of a connection.
LOST = (
    "gloo/transport",
    "closed by peer",
    "closed by remote peer",
    "reset by peer",
    "Broken pipe",
    "remote process exited",
    "communicator was aborted",
    "Watchdog caught collective operation timeout",
    "NCCL operations have failed or timed out",
)
# Errors of NCCL that are this rank's own, and how to mend them.
NCCL_ADVICE = {
    "Duplicate GPU detected": "two processes use the same GPU: start one process per GPU, and call "
    "torch.cuda.set_device(LOCAL_RANK) before the first collective (rawloop.open_world does)",
    "shared memory": "NCCL needs room in /dev/shm: start the container with --shm-size=8g or --ipc=host",
    "out of memory": "this rank's GPU is full: lower train.batch_size, or end what else runs on the GPU",
    "unhandled cuda error": "a CUDA call of this rank failed: run it again with NCCL_DEBUG=INFO, and with "
    "CUDA_LAUNCH_BLOCKING=1 to see which one",
    "unhandled system error": "a system call of this rank failed (/dev/shm, sockets): run with NCCL_DEBUG=INFO",
    "invalid usage": "run it again with NCCL_DEBUG=WARN, which names the wrong argument",
}


def is_lost_rank(error: BaseException) -> bool:
    """Return whether an error says that another rank has gone or did not come; NCCL also fails by itself."""
    if any(sign in str(error) for sign in LOST):
        return True
    return isinstance(error, dist.DistError) and not isinstance(error, dist.DistBackendError)


def nccl_advice(error: BaseException) -> str | None:
    """Return how to mend an error of NCCL that is this rank's own."""
    if "NCCL" not in str(error) or is_lost_rank(error):
        return None
    return next((advice for sign, advice in NCCL_ADVICE.items() if sign in str(error)), None)


class Waiting:
    """One rank's marks in the store, and its reading of the others'.

    Args:
        store: of torch.distributed.
        rank: this process's.
        size: number of ranks.
        timeout: seconds that this rank waits for one that neither comes nor says that it works (ddp.timeout).
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: float) -> None:
        self.store, self.rank, self.size, self.timeout = store, rank, size, timeout
        self.patience = min(PATIENCE, timeout / 4)
        self.agreement = 0  # number of the agreement that this rank has come to
        self.signs = 0  # of work, that this rank has given

    def finish(self, work: Any) -> None:
        """Wait for a collective that was begun, as long as a missing rank says that it works.

        Raises:
            RuntimeError: it failed.
            LostRank: somebody did not come in time.
        """
        self.agreement += 1
        if _done(work, self.patience):
            return
        self._mark([])
        seen, last = self._read("working"), time.monotonic() - self.patience
        while time.monotonic() < last + self.timeout:
            if _done(work, self.patience):
                return
            signs = self._read("working")
            if signs != seen:
                seen, last = signs, time.monotonic()
        # A rank that came just now has left no mark yet.
        if not _done(work, self.patience + 1):
            raise self._nobody_came()

    @contextmanager
    def working(self) -> Iterator[None]:
        """Let the others wait for this rank inside, however long it takes; if it dies, or is stopped, they notice."""
        done = Event()
        Thread(target=self._give_signs, args=(done,), daemon=True).start()
        try:
            yield
        finally:
            done.set()

    def _give_signs(self, done: Event) -> None:
        while not done.wait(self.patience):
            self.signs += 1
            with suppress(RuntimeError, OSError):  # the store has gone: the others will say what they miss
                self._knock()
                self.store.set(f"working-{self.rank}", json.dumps(self.signs))

    def explain(self, error: Exception) -> LostRank:
        """Return what this rank knows of the cause of a collective's error."""
        if "Timed out" in str(error) or "timed out" in str(error):  # in DDP, which has limits of its own
            self._mark(None)
            time.sleep(self.patience + 1)  # whoever came just before leaves its mark
            return self._nobody_came()
        self._mark([])
        time.sleep(self.patience / 4)  # a rank whose time is over closes its connections, and then leaves its mark
        if any(mark["missing"] is None for mark in self._read("waiting").values()):
            time.sleep(self.patience + 2)  # until that rank knows who was missing
        ended = f"another rank has ended, and its message says why ({str(error).splitlines()[0]})"
        return self._missed_by_others(self._read("waiting")) or LostRank(ended)

    def _nobody_came(self) -> LostRank:
        marks = self._read("waiting")
        if self.rank not in marks:  # not even its own: the store has ended with its host
            rest = "which one is not known here, the message of the rank that ended first says it"
            return LostRank(f"a rank did not come in time, within {self.timeout:g} s (ddp.timeout); {rest}")
        if found := self._missed_by_others(marks):
            return found
        here = {rank for rank, mark in marks.items() if mark["agreement"] == self.agreement}
        missing = sorted(set(range(self.size)) - here)
        self._mark(missing)
        return self._did_not_come(missing)

    def _missed_by_others(self, marks: Mapping[int, Any]) -> LostRank | None:
        """Return what another rank has said before it ended, if it had waited in vain: perhaps for this one."""
        for rank, mark in marks.items():
            if mark["missing"] and self.rank in mark["missing"]:
                whom = f"rank {rank} had waited {self.timeout:g} s for it (ddp.timeout) and has ended"
                return LostRank(f"rank {self.rank} came too late: {whom}")
            if mark["missing"]:
                return self._did_not_come(mark["missing"])
        return None

    def _did_not_come(self, missing: list[int]) -> LostRank:
        if missing:
            names = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
            what = f"{names} did not come in time: the others waited {self.timeout:g} s (ddp.timeout)"
            advice = "look what held it there; if it was only slow (its data, its network), raise ddp.timeout"
        else:
            what = f"the ranks waited {self.timeout:g} s (ddp.timeout) for each other, and none was missing"
            advice = "look whether the network between them carries data, and raise ddp.timeout if it is only slow"
        error = LostRank(f"{what}: {advice}")
        error.is_reporter = self.rank == min(set(range(self.size)) - set(missing))
        return error

    def _mark(self, missing: list[int] | None) -> None:
        """Say that this rank has come to its agreement, and whom it has missed: None is not known yet."""
        content = json.dumps({"agreement": self.agreement, "missing": missing})
        self._try(lambda: self.store.set(f"waiting-{self.rank}", content))

    def _read(self, name: str) -> dict[int, Any]:
        found: dict[int, Any] = {}

        def read() -> None:
            for rank in range(self.size):
                if self.store.check([f"{name}-{rank}"]):
                    found[rank] = json.loads(self.store.get(f"{name}-{rank}"))

        self._try(read)
        return dict(found)

    def _try(self, work: Callable[[], None]) -> None:
        """Use the store, whose host may have gone: in a thread that nobody waits for longer than a while."""

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


def _done(work: Any, seconds: float) -> bool:
    """Wait for a collective; whether it is done.

    Raises:
        RuntimeError: it failed.
    """
    try:
        work.wait(timedelta(seconds=seconds))
    except RuntimeError:
        if not work.is_completed():
            return False
        work.wait()  # it has failed, or was done at the last moment
    return True
