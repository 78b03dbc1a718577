"""Data workers: when they are forked, how batches travel from them, and the error when one of them dies.

A batch travels as plain bytes. torch would move each tensor by a file descriptor into shared memory: a run with few
descriptors hangs on that, and a small /dev/shm kills workers (SIGBUS). A batch has some kilobytes, or some megabytes of
features, and another copy of it costs little beside making it.
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

PER_WORKER = 8  # file descriptors that a worker takes in the process that started it, and some more
SPARE = 16  # those that a run opens after its start: records, checkpoints


class Packed:
    """A batch without tensors, as it goes through a pipe."""

    def __init__(self, batch: Batch) -> None:
        self.inputs = {name: _bytes(tensor) for name, tensor in batch.inputs.items()}
        self.labels = {stream: tuple(map(_bytes, pair)) for stream, pair in batch.labels.items()}
        self.targets, self.ids = batch.targets, batch.ids

    def batch(self) -> Batch:
        """Return the batch with its tensors."""
        inputs = {name: _tensor(*packed) for name, packed in self.inputs.items()}
        labels = {stream: Labels(*(_tensor(*packed) for packed in pair)) for stream, pair in self.labels.items()}
        return Batch(inputs, labels, self.targets, self.ids)

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory (called by torch's DataLoader when pinning is on)."""
        return self.batch().pin_memory()


def _bytes(tensor: Tensor) -> tuple[bytearray, torch.dtype, torch.Size]:
    flat = tensor.detach().contiguous().flatten()
    return bytearray(flat.view(torch.uint8).numpy().data), tensor.dtype, tensor.shape


def _tensor(content: bytearray, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    return torch.frombuffer(content, dtype=dtype).view(shape) if content else torch.empty(shape, dtype=dtype)


class Order:
    """The sampler of a DataLoader: yields the places that were assigned last."""

    draws: Iterable[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.draws)


class Workers:
    """Processes that make micro-batches of one data set. They are forked at the first use and live until `close`.

    Args:
        dataset: returns the micro-batch of a list of places, or the error.
        number: of processes.
        pin_memory: hand batches over in page-locked memory.
    """

    def __init__(self, dataset: Dataset[Batch | RawloopError], number: int, pin_memory: bool) -> None:
        self.number, self.order, self.turn = number, Order(), 0
        self.loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=None,
            sampler=self.order,
            num_workers=number,
            collate_fn=_pack,
            worker_init_fn=_begin,
            pin_memory=pin_memory,
            persistent_workers=True,
            multiprocessing_context="fork",  # other contexts would have to pickle the family
            generator=torch.Generator(),  # torch would seed workers from training's random stream
        )

    def iterate(self, draws: Iterable[Any]) -> Iterator[Batch | RawloopError]:
        """Yield the micro-batch of each list of places, or the error. An earlier iteration cannot be continued.

        Raises RawloopError if a worker has died or cannot be started.
        """
        if self.loader._iterator is None:
            check_descriptors(self.number)
            wait_for_libraries_threads()
        self.turn, self.order.draws = self.turn + 1, draws
        turn = self.turn
        iterator = self._start()
        while True:
            if turn != self.turn:
                raise RawloopError("the data workers make other batches by now: give each use a Loader of its own")
            try:
                item = next(iterator)
            except StopIteration:
                return
            except RuntimeError as error:
                raise self._death(iterator, error) from error
            yield item.batch() if isinstance(item, Packed) else item

    def close(self) -> None:
        """End the workers. A later iteration forks others."""
        iterator: Any = self.loader._iterator
        self.loader._iterator = None
        self.turn += 1  # an iteration that is not finished cannot be continued
        if iterator is not None:
            iterator._shutdown_workers()  # torch does it when the last reference goes, which a traceback may keep

    def _start(self) -> Any:
        """Fork the workers, or give those that are there the new places."""
        before = signal.getsignal(signal.SIGCHLD)
        try:
            return iter(self.loader)
        except OSError as error:
            raise RawloopError(f"data.num_workers is {self.number}, which cannot be started: {error}") from error
        except RuntimeError as error:
            raise self._death(self.loader._iterator, error) from error
        finally:
            # torch raises a worker's death wherever the main thread stands, in a step of other samples. Asked for the
            # next batch, the loader finds it itself.
            if before is not None and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGCHLD, before)

    def _death(self, iterator: Any, error: RuntimeError) -> Exception:
        """Return what to raise for torch's error: the death of a worker in one line, or the error itself."""
        dead = [worker for worker in iterator._workers if worker.exitcode]
        return RawloopError(_in_words(dead[0].pid, dead[0].exitcode)) if dead else error


def _pack(item: Any) -> Any:
    return Packed(item) if isinstance(item, Batch) else item


def _begin(number: int) -> None:
    leave_signals_to_parent()


def check_descriptors(num_workers: int, spare: int = 0) -> None:
    """Let this process open as many files as so many workers need, and `spare` ones, or raise UserError."""
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
        return 32  # not Linux, or no descriptor is left to look with


def wait_for_libraries_threads(limit: float = 2.0) -> None:
    """Wait, for `limit` seconds at most, until only Python's own threads are running: then a fork is safe.

    A thread of a library that takes the GIL (gloo's, when it frees a tensor after a collective) holds the interpreter's
    list of threads for a moment, without the GIL. Up to Python 3.11 at least, `fork` does not wait for that, and a
    child that is forked in this moment waits for it for ever (`_PyThreadState_DeleteExcept`), and with it all ranks.
    """
    known = {threading.get_native_id(), *(thread.native_id for thread in threading.enumerate())}
    deadline = time.monotonic() + limit
    while running_threads(known) and time.monotonic() < deadline:
        time.sleep(0.001)  # lets go of the GIL, which they may want


def running_threads(known: Collection[int | None]) -> list[int]:
    """Return the ids of this process's threads that are running or about to, without `known`. Empty off Linux."""
    found = []
    for task in Path("/proc/self/task").glob("*"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            state = (task / "stat").read_text().rpartition(")")[2].split()[0]  # the name before it may hold anything
            if state in "RD" and int(task.name) not in known:
                found.append(int(task.name))
    return found


def _in_words(pid: int, code: int) -> str:
    if code > 0:
        return f"a data worker (process {pid}) has ended with exit code {code}; its output says why"
    name = signal.Signals(-code).name
    why = ": the system does that when memory runs out" if -code == signal.SIGKILL else ""
    return (
        f"a data worker (process {pid}) was killed by {name}{why}; no sample is known to be at fault: lower "
        "data.num_workers, or look into the system's log"
    )
