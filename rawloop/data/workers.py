"""Data workers: what they hand over, how they end, and what is said when one does.

A batch travels as plain bytes. torch would move each tensor by a file descriptor into shared memory: a run with few
descriptors hangs on that, and a small /dev/shm kills workers (SIGBUS). A batch has some kilobytes, or some megabytes of
features; one copy more is nothing beside making it.
"""

import os
import resource
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from rawloop.contracts import Batch, Labels
from rawloop.errors import RawloopError, UserError
from rawloop.preempt import left_to_the_parent

PER_WORKER = 8  # file descriptors of this process that a worker takes, and some more


class Packed:
    """A batch without tensors, as it goes through a pipe."""

    def __init__(self, batch: Batch) -> None:
        self.inputs = {name: _bytes(tensor) for name, tensor in batch.inputs.items()}
        self.labels = {stream: tuple(map(_bytes, pair)) for stream, pair in batch.labels.items()}
        self.targets, self.ids = batch.targets, batch.ids

    def batch(self) -> Batch:
        """Return the batch."""
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


def pack(item: Any) -> Any:
    """What a worker does with a micro-batch before it hands it over; errors stay as they are."""
    return Packed(item) if isinstance(item, Batch) else item


def in_worker(number: int) -> None:
    """The first thing that a worker does."""
    left_to_the_parent()


def check_descriptors(num_workers: int) -> None:
    """Let this process open as many files as its workers need.

    Raises:
        UserError: it may not.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _open_files() + PER_WORKER * (num_workers + 1)
    if needed > soft and (hard == resource.RLIM_INFINITY or needed <= hard):
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    elif needed > soft:
        raise UserError(
            f"data.num_workers is {num_workers}, for which this process needs about {needed} open files, and it may "
            f"have {hard}: allow it more (`ulimit -n 4096`), or lower data.num_workers"
        )


def _open_files() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 32  # not Linux, or none is left to look with


def items(loader: DataLoader[Any]) -> Iterator[Any]:
    """Iterate a loader with workers, and say in one line how one of them ended before its time.

    Raises:
        RawloopError: a worker has ended, or cannot be started.
    """
    before = signal.getsignal(signal.SIGCHLD)
    try:
        iterator: Any = iter(loader)
    except OSError as error:
        raise RawloopError(f"data.num_workers is {loader.num_workers}, which cannot be started: {error}") from error
    finally:
        # torch raises a worker's end wherever the main thread stands, in a step of other samples; asked, it knows too.
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, before)
    try:
        yield from iterator
    except RuntimeError as error:
        ended = [worker for worker in iterator._workers if worker.exitcode]
        if not ended:
            raise
        raise RawloopError(_ended(ended[0].pid, ended[0].exitcode)) from error


def _ended(pid: int, code: int) -> str:
    if code > 0:
        return f"a data worker (process {pid}) has ended with exit code {code}; its output says why"
    name = signal.Signals(-code).name
    why = ": the system does that when memory runs out" if -code == signal.SIGKILL else ""
    return (
        f"a data worker (process {pid}) was killed by {name}{why}; no sample is known to be at fault: lower "
        "data.num_workers, or look into the system's log"
    )
