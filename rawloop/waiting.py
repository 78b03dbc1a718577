"""Lost ranks: how long a rank waits for the others, which rank did not come, and which errors mean a lost rank.

A rank that has waited for a while writes `waiting-RANK` into the store of the process group. A rank that works for long
writes `working-RANK` again and again, and the others keep waiting. The first rank whose time is over writes `verdict`:
the ranks that did not come. The others read it, so all of them name the same rank. The hot path uses no store.
"""

import json
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Event, Thread
from typing import Any

import torch.distributed as dist

from rawloop.errors import LostRank

PATIENCE = 5.0  # seconds that a rank waits before it uses the store, and between two signs of a rank that works
ANSWER = 10.0  # seconds in which the store answers, unless its host has ended

# Errors of gloo and NCCL whose cause is another rank. NCCL's text for its own timeout does not mention a connection.
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
# Errors of NCCL whose cause is this rank, and how to fix them.
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
    """Return whether an error means that another rank has ended or did not come. NCCL also fails for other reasons."""
    if any(sign in str(error) for sign in LOST):
        return True
    return isinstance(error, dist.DistError) and not isinstance(error, dist.DistBackendError)


def nccl_advice(error: BaseException) -> str | None:
    """Return how to fix an error of NCCL whose cause is this rank, or None."""
    if "NCCL" not in str(error) or is_lost_rank(error):
        return None
    return next((advice for sign, advice in NCCL_ADVICE.items() if sign in str(error)), None)


class Waiting:
    """How one rank waits for the others. The ranks leave notes for each other in the store of the process group.

    Args:
        store: of torch.distributed.
        rank: of this process.
        size: number of ranks.
        timeout: seconds that this rank waits for a rank that neither comes nor works (ddp.timeout).
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: float) -> None:
        self.store, self.rank, self.size, self.timeout = store, rank, size, timeout
        self.patience = min(PATIENCE, timeout / 4)
        self.agreement = 0  # number of this rank's last collective

    def finish(self, work: Any) -> None:
        """Wait for a collective that has started. A rank that works for long is waited for without limit.

        Raises:
            RuntimeError: the collective failed.
            LostRank: a rank did not come in time.
        """
        self.agreement += 1
        if _done(work, self.patience):
            return
        self._write(f"waiting-{self.rank}", self.agreement)
        keys = [*self._keys("working"), "verdict"]
        seen, last = self._read(keys), time.monotonic() - self.patience
        while time.monotonic() < last + self.timeout:
            if _done(work, self.patience):
                return
            found = self._read(keys)
            if "verdict" in found and (error := self._verdict()):
                raise error
            if found != seen:
                seen, last = found, time.monotonic()
        # A rank that came just now has not written yet that it waits.
        if not _done(work, self.patience + 1):
            raise self._judge()

    @contextmanager
    def working(self) -> Iterator[None]:
        """While inside, the other ranks wait for this rank without limit. If it dies or is suspended, they notice."""
        done = Event()
        Thread(target=self._give_signs, args=(done,), daemon=True).start()
        try:
            yield
        finally:
            done.set()

    def _give_signs(self, done: Event) -> None:
        while not done.wait(self.patience):
            with suppress(RuntimeError, OSError):  # the store has ended: the others will say which rank is missing
                self._check_host()
                self.store.set(f"working-{self.rank}", json.dumps(time.time()))

    def explain(self, error: Exception) -> LostRank:
        """Return an error that says why a collective failed, as far as this rank knows."""
        self._write(f"waiting-{self.rank}", self.agreement)
        if "timed out" in str(error).lower():  # in DDP, which has its own time limit
            self._write("judging", True)
            time.sleep(self.patience + 1)  # a rank that came just before writes that it waits
            return self._judge()
        time.sleep(self.patience / 4)  # a rank that times out closes its connections, and then writes `judging`
        if self._read(["judging"]):
            time.sleep(self.patience + 2)  # until that rank has written its verdict
        ended = f"another rank has ended, and its message says why ({str(error).splitlines()[0]})"
        return self._verdict() or LostRank(ended)

    def _judge(self) -> LostRank:
        """Write which ranks did not come, unless another rank has done so, and return the error."""
        marks = self._read(self._keys("waiting")) | {f"waiting-{self.rank}": self.agreement}
        missing = [rank for rank, key in enumerate(self._keys("waiting")) if marks.get(key) != self.agreement]
        verdict = json.dumps({"by": self.rank, "missing": missing})
        self._try(lambda: self.store.compare_set("verdict", "", verdict))
        # Without a verdict the store has ended, together with the rank that hosts it.
        rest = "which one is not known here, the message of the rank that ended first says it"
        return self._verdict() or LostRank(
            f"a rank did not come in time, within {self.timeout:g} s (ddp.timeout); {rest}"
        )

    def _verdict(self) -> LostRank | None:
        """Return the error about the missing ranks that a rank has written, if one has."""
        verdict = self._read(["verdict"]).get("verdict")
        if verdict is None:
            return None
        missing, waited = verdict["missing"], f"waited {self.timeout:g} s"
        if self.rank in missing:
            whom = f"rank {verdict['by']} had {waited} for it (ddp.timeout) and has ended"
            return LostRank(f"rank {self.rank} came too late: {whom}")
        here = [rank for rank in range(self.size) if rank not in missing]
        self._write(f"told-{self.rank}", True)
        self._try(lambda: self._wait_for_readers(here))
        if missing:
            names = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
            what = f"{names} did not come in time: the others {waited} (ddp.timeout)"
            advice = "look what held it there; if it was only slow (its data, its network), raise ddp.timeout"
        else:
            what = f"the ranks {waited} (ddp.timeout) for each other, and none was missing"
            advice = "look whether the network between them carries data, and raise ddp.timeout if it is only slow"
        error = LostRank(f"{what}: {advice}")
        error.is_reporter = self.rank == min(here)
        return error

    def _wait_for_readers(self, ranks: list[int]) -> None:
        """Wait, for less than `ANSWER`, until these ranks have read the verdict: this process may host the store."""
        deadline = time.monotonic() + 0.8 * ANSWER
        while time.monotonic() < deadline and not self.store.check([f"told-{rank}" for rank in ranks]):
            time.sleep(0.1)
            self._check_host()

    def _keys(self, name: str) -> list[str]:
        return [f"{name}-{rank}" for rank in range(self.size)]

    def _write(self, key: str, value: Any) -> None:
        self._try(lambda: self.store.set(key, json.dumps(value)))

    def _read(self, keys: Iterable[str]) -> dict[str, Any]:
        """Return the values of those keys that the store has."""
        found: dict[str, Any] = {}

        def read() -> None:
            for key in keys:
                if self.store.check([key]):
                    found[key] = json.loads(self.store.get(key))

        self._try(read)
        return dict(found)

    def _try(self, use: Callable[[], object]) -> None:
        """Use the store in a thread, and wait for it at most `ANSWER` seconds: its host may have ended."""

        def attempt() -> None:
            with suppress(RuntimeError, OSError):
                self._check_host()
                use()

        thread = Thread(target=attempt, daemon=True)
        thread.start()
        thread.join(ANSWER)

    def _check_host(self) -> None:
        """Raise OSError if the store's host has ended: torch's own attempts would print pages of C++ frames."""
        store = self.store
        while hasattr(store, "underlying_store"):
            store = store.underlying_store
        if hasattr(store, "host"):
            socket.create_connection((store.host, store.port), timeout=1).close()


def _done(work: Any, seconds: float) -> bool:
    """Wait for a collective at most so long, and return whether it is done.

    Raises:
        RuntimeError: it failed.
    """
    try:
        work.wait(timedelta(seconds=seconds))
    except RuntimeError:
        if not work.is_completed():
            return False
        work.wait()  # raises if it has failed; it may also have succeeded at the last moment
    return True
