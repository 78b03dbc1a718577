"""Data workers: forks them, passes batches from them, and reports when one of them dies.

A batch goes through a pipe as bytes. torch would pass each tensor by a file descriptor in shared memory: without enough
descriptors a run hangs, and a small /dev/shm kills workers (SIGBUS). A batch has kilobytes, or megabytes of features,
so a copy costs little compared with making it.
"""

import os
import resource
import signal
import threading
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rawloop.contracts import Batch, Labels
from rawloop.errors import RawloopError, UserError
from rawloop.preempt import leave_signals_to_parent

PER_WORKER = 8  # file descriptors per worker in its parent process, rounded up
SPARE = 16  # file descriptors that a run opens after its start, for records and checkpoints


class Packed:
    """A batch with bytes for tensors, to go through a pipe."""

    def __init__(self, batch: Batch) -> None:
        self.inputs = {name: _bytes(tensor) for name, tensor in batch.inputs.items()}
        self.labels = {stream: tuple(map(_bytes, pair)) for stream, pair in batch.labels.items()}
        self.targets, self.ids, self.work = batch.targets, batch.ids, batch.work

    def batch(self) -> Batch:
        """Return the batch with its tensors."""
        inputs = {name: _tensor(*packed) for name, packed in self.inputs.items()}
        labels = {stream: Labels(*(_tensor(*packed) for packed in pair)) for stream, pair in self.labels.items()}
        return Batch(inputs, labels, self.targets, self.ids, self.work)

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory (called by torch's DataLoader when pinning is on)."""
        return self.batch().pin_memory()


def _bytes(tensor: Tensor) -> tuple[bytearray, torch.dtype, torch.Size]:
    flat = tensor.detach().contiguous().flatten()
    return bytearray(flat.view(torch.uint8).numpy().data), tensor.dtype, tensor.shape


def _tensor(content: bytearray, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    return torch.frombuffer(content, dtype=dtype).view(shape) if content else torch.empty(shape, dtype=dtype)


class Order:
    """The sampler of a DataLoader: yields the draws that were assigned last."""

    draws: Iterable[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.draws)


class Workers:
    """Processes that make micro-batches of one data set. They are forked at the first use and live until `close`.

    Args:
        dataset: returns the micro-batch of a list of draws, or the error.
        number: of processes.
        pin_memory: return batches in page-locked memory.
    """

    def __init__(self, dataset: Dataset[Batch | RawloopError], number: int, pin_memory: bool) -> None:
        self.number, self.order, self.turn = number, Order(), 0
        self.loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=None,
            sampler=self.order,
            num_workers=number,
            collate_fn=_pack,
            worker_init_fn=lambda _: leave_signals_to_parent(),
            pin_memory=pin_memory,
            persistent_workers=True,
            multiprocessing_context="fork",  # other contexts would pickle the family
            generator=torch.Generator(),  # else torch draws the workers' seed from training's random stream
        )

    def iterate(self, draws: Iterable[Any]) -> Iterator[Batch | RawloopError]:
        """Yield the micro-batch of each list of draws, or the error. This ends any earlier iteration.

        Raises RawloopError if a worker dies or cannot be started.
        """
        if self.loader._iterator is None:
            check_descriptors(self.number)
            wait_for_libraries_threads()
        self.turn, self.order.draws = self.turn + 1, draws
        turn = self.turn
        iterator = self._start()
        while True:
            if turn != self.turn:
                raise RawloopError("the data workers now make other batches: give each use its own Loader")
            try:
                item = next(iterator)
            except StopIteration:
                return
            except RuntimeError as error:
                raise self._death(iterator, error) from error
            yield item.batch() if isinstance(item, Packed) else item

    def close(self) -> None:
        """End the workers and any iteration. A later iteration forks new workers."""
        iterator: Any = self.loader._iterator
        self.loader._iterator = None
        self.turn += 1
        if iterator is not None:
            iterator._shutdown_workers()  # torch waits until no reference is left, and a traceback may keep one

    def _start(self) -> Any:
        """Fork the workers, or give existing workers the new draws."""
        before = signal.getsignal(signal.SIGCHLD)
        try:
            return iter(self.loader)
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and self.loader._iterator is not None:
                raise self._death(self.loader._iterator, error) from error
            raise RawloopError(f"data.num_workers is {self.number}, which cannot be started: {error}") from error
        finally:
            # torch's handler raises a worker's death anywhere in the main thread, for example in a step with other
            # samples. Without it, the loader raises at the next batch.
            if before is not None and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGCHLD, before)

    def _death(self, iterator: Any, error: RuntimeError) -> Exception:
        """Return the error for a dead worker in one line, or torch's error if no worker is dead."""
        dead = [worker for worker in iterator._workers if worker.exitcode]
        return RawloopError(_cause(dead[0].pid, dead[0].exitcode)) if dead else error


def _pack(item: Any) -> Any:
    return Packed(item) if isinstance(item, Batch) else item


def check_descriptors(num_workers: int, spare: int = 0) -> None:
    """Raise this process's limit of open files for `num_workers` and `spare` files, or raise UserError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _open_files() + PER_WORKER * num_workers + spare
    if needed > soft and (hard == resource.RLIM_INFINITY or needed <= hard):
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    elif needed > soft:
        raise UserError(
            f"{num_workers} data workers need about {needed} open files in this process, which may have {hard}: allow "
            "it more (`ulimit -n 4096`), or lower data.num_workers"
        )


def _open_files() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 32  # not Linux, or no descriptor is left


def wait_for_libraries_threads(limit: float = 2.0) -> None:
    """Wait until only Python's own threads are running, for at most `limit` seconds: then a fork is safe.

    A library's thread that takes the GIL (gloo's, to free a tensor after a collective) locks the interpreter's list of
    threads for a moment, without the GIL. `fork` does not wait for that (at least up to Python 3.11). A child forked in
    this moment would wait for the lock forever (`_PyThreadState_DeleteExcept`), and all ranks with it.
    """
    known = {threading.get_native_id(), *(thread.native_id for thread in threading.enumerate())}
    deadline = time.monotonic() + limit
    while running_threads(known) and time.monotonic() < deadline:
        time.sleep(0.001)  # releases the GIL, which the threads may need


def running_threads(known: Collection[int | None]) -> list[int]:
    """Return the ids of this process's runnable threads, without `known`. Empty except on Linux."""
    found = []
    for task in Path("/proc/self/task").glob("*"):
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
            state = (task / "stat").read_text().rpartition(")")[2].split()[0]  # after the name, which may contain ")"
            if state in "RD" and int(task.name) not in known:
                found.append(int(task.name))
    return found


def _cause(pid: int, code: int) -> str:
    if code > 0:
        return f"a data worker (process {pid}) has ended with exit code {code}; its output says why"
    name = signal.Signals(-code).name
    why = ": the system does that when memory runs out" if -code == signal.SIGKILL else ""
    return (
        f"a data worker (process {pid}) was killed by {name}{why}; no sample is known to be at fault: lower "
        "data.num_workers, or look into the system's log"
    )
