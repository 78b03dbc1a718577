"""Ranks and collectives.

`World.current()` describes the processes that torch.distributed knows, or a single process where it is not initialised.
`open_world` starts and ends the process group as well.
"""

import atexit
import ctypes
import json
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import lru_cache, reduce
from threading import Thread
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from rawloop.ddp import DDPConfig, wrap_in_ddp
from rawloop.errors import RawloopError, UserError
from rawloop.launcher import choose_device, join_group, read_launch, read_ranks
from rawloop.waiting import Waiting, is_lost_rank, nccl_advice

FOREVER = timedelta(days=1000)
ABORT = 5.0  # seconds in which a process group is aborted
T = TypeVar("T")
E = TypeVar("E", bound=RawloopError)


@dataclass(frozen=True)
class World:
    """One process among `size`: its rank, its rank on this machine, and its device.

    `launch` names the launcher's run, "" without torchrun; `restarts` counts how often it has started its processes
    again after one of them had died. `group` is a gloo group over all ranks, for agreements between CPUs.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    launch: str = ""
    restarts: int = 0
    waiting: Waiting | None = field(default=None, compare=False, repr=False)
    group: Any = field(default=None, compare=False, repr=False)

    @classmethod
    def current(cls) -> "World":
        """Return the world that torch.distributed describes; a single process where it is not initialised.

        The first call after `init_process_group` makes a gloo group, so all ranks must make it. Later ones return the
        same world, until the process group is another one.

        Raises:
            UserError: the launcher has started several processes, and no process group is initialised.
        """
        if dist.is_available() and dist.is_initialized():
            return _world_of(dist.group.WORLD)
        _, size, local_rank = read_ranks()
        if size > 1:
            raise UserError(
                f"WORLD_SIZE is {size}, and torch.distributed is not initialised: each of these processes would train "
                "alone; call torch.distributed.init_process_group first, or use `with rawloop.open_world() as world`"
            )
        launch, restarts = read_launch()
        return cls(local_rank=local_rank, device=choose_device("auto", local_rank), launch=launch, restarts=restarts)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Sum each value over all ranks, in float64. One all_reduce between CPUs, so no device is waited for."""
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        self._finish(dist.all_reduce(tensor, group=self.group, async_op=True))
        return list(tensor.tolist())

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, in order of rank, on every rank. For small objects."""
        if self.size == 1:
            return [value]
        own = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        self._finish(dist.all_gather(sizes, torch.tensor([len(own)]), group=self.group, async_op=True))
        longest = max(int(size) for size in sizes)
        rows = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        padded = torch.cat([own, own.new_zeros(longest - len(own))])
        self._finish(dist.all_gather(rows, padded, group=self.group, async_op=True))
        contents = [row[: int(size)].numpy().tobytes() for row, size in zip(rows, sizes, strict=True)]
        return [pickle.loads(content) for content in contents]  # noqa: S301 (from our own ranks)

    def _finish(self, work: Any) -> None:
        if self.waiting is None:
            work.wait()
        else:
            self.waiting.finish(work)

    def make_equal(self, tensors: Sequence[torch.Tensor]) -> None:
        """Make tensors equal on all ranks, in place: floats become their mean, other numbers their maximum.

        The shapes are those of the other ranks. Nothing waits for the device.
        """
        for floats in (True, False) if self.size > 1 else ():
            chosen = [tensor for tensor in tensors if tensor.is_floating_point() == floats]
            if not chosen:
                continue
            dtypes = [tensor.dtype for tensor in chosen]
            wide = reduce(torch.promote_types, dtypes, torch.float32) if floats else torch.int64
            flat = torch.cat([tensor.detach().flatten().to(wide) for tensor in chosen])
            operation = dist.ReduceOp.SUM if floats else dist.ReduceOp.MAX
            group = self.group if flat.device.type == "cpu" else None
            work = dist.all_reduce(flat, operation, group=group, async_op=True)
            if flat.device.type == "cpu":
                self._finish(work)
            else:
                work.wait()  # the device's queue does; with a limit of time the host would
            flat = flat / self.size if floats else flat
            with torch.no_grad():
                for tensor, values in zip(chosen, torch.split(flat, [t.numel() for t in chosen]), strict=True):
                    tensor.copy_(values.view_as(tensor))

    def any(self, flags: Sequence[bool]) -> Sequence[bool]:
        """Of each flag, whether it is true on any rank. One all_reduce."""
        return flags if self.size == 1 else [count > 0 for count in self.sum([float(flag) for flag in flags])]

    def from_main(self, value: T) -> T:
        """Return rank 0's value on every rank."""
        return self.gather(value)[0]

    def on_all_ranks(self, work: Callable[[], T], only_main: bool = False) -> T | None:
        """Run `work` on every rank (or on rank 0), then agree: an error on any rank is raised on all of them.

        No rank is left waiting in a collective for one that has failed, and none gives up on one that works for long.

        Raises:
            RawloopError: the first failing rank's own error; other ranks' copies name that rank.
            Exception: any other error, on the rank where it happened; the others raise a RawloopError that quotes it.
        """
        result: T | None = None
        error: Exception | None = None
        if self.is_main or not only_main:
            try:
                with self.working():
                    result = work()
            except OSError as caught:  # a failing disk is no bug
                error = RawloopError(f"{type(caught).__name__}: {caught}")
            except Exception as caught:
                error = caught
        said = self.gather(_in_words(error) if error else None)
        rank = next((rank for rank, words in enumerate(said) if words), None)
        if rank is None:
            return result
        if error is not None and self.rank == rank:
            raise self.raised_on_all(error) if isinstance(error, RawloopError) else error
        kind, failed, message = said[rank] or (RawloopError, "", "")
        name = f"rank {rank}{failed}: " if rank or failed else ""
        raise self.raised_on_all(kind(f"{name}{message}")) from error

    def working(self) -> AbstractContextManager[None]:
        """Tell the others, while inside, that this rank works and will come: none of them gives up on it."""
        return self.waiting.working() if self.waiting else nullcontext()

    def raised_on_all(self, error: E) -> E:
        """Mark an error that all ranks raise alike: rank 0 alone tells it."""
        error.is_reporter = self.is_main
        return error

    def check_equal(self, facts: Mapping[str, Any], advice: str = "start all processes alike") -> None:
        """Refuse facts that are not the same on all ranks, such as settings and digests of data. All ranks call this.

        Args:
            facts: by name; values that JSON can hold, small ones.
            advice: how to mend a difference.

        Raises:
            UserError: on all ranks alike, with the first differences, each with a rank that differs from rank 0.
        """
        shares = self.gather({name: _shown(value) for name, value in facts.items()})
        found = []
        for name in dict.fromkeys(name for share in shares for name in share):
            values = [share.get(name, "nothing") for share in shares]
            others = [rank for rank, value in enumerate(values) if value != values[0]]
            if others:
                more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
                found.append(f"rank {others[0]}{more} has {name} {values[others[0]]}, rank 0 has {values[0]}")
        if found:
            rest = f"; and {len(found) - 3} more differences" if len(found) > 3 else ""
            raise self.raised_on_all(UserError(f"the ranks differ: {'; '.join(found[:3])}{rest}: {advice}"))

    def wrap(self, module: nn.Module, config: DDPConfig | None = None) -> nn.Module:
        """Wrap any module in DDP, or return it as it is in a single process.

        With `find_unused_parameters` off, `PrecisionPolicy.step` ends the run where a trained weight got no gradient:
        DDP would wait for ever, or let the ranks drift apart.
        """
        return module if self.size == 1 else wrap_in_ddp(module, config or DDPConfig())


def _in_words(error: Exception) -> tuple[type[RawloopError], str, str]:
    """Return the type that other ranks raise for an error of this one, what follows `rank N`, and the message."""
    if not isinstance(error, RawloopError):
        return RawloopError, " failed", f"{type(error).__name__}: {error}"
    # A subclass from elsewhere may be unknown to the others, or take other arguments.
    kind = next(kind for kind in type(error).__mro__ if kind.__module__ == RawloopError.__module__)
    return kind, "", str(error)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def num_processes() -> int:
    """Return the number of processes of the process group, or of the launcher before there is a group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else read_ranks()[1]


@lru_cache(maxsize=1)  # the last process group's: all parts of a process share one world and its gloo group
def _world_of(default: Any) -> World:
    """Describe the default process group. All ranks call it together."""
    # A DDP module that outlives its group would be the last to hold it, and its reducer destroys it with the GIL held
    # while gloo's thread waits for the GIL: a deadlock at exit. Held until the interpreter ends, the group is destroyed
    # by its own binding, which lets go of the GIL.
    atexit.register(id, default)
    rank, size = dist.get_rank(), dist.get_world_size()
    on_gpus = "nccl" in dist.get_backend_config(default)
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpus else torch.device("cpu")
    world = World(rank, size, read_ranks()[2], device, *read_launch())
    if size == 1:
        return world
    options = getattr(default._get_backend(default._device_types[0]), "options", None)  # not every backend has them
    limit = options._timeout if options else dist.default_pg_timeout
    # Agreements have a group of their own: a plain NCCL group cannot reduce CPU tensors, and here `Waiting` sets the
    # limits, for a rank that works longer than ddp.timeout ends nothing.
    group = dist.new_group(backend="gloo", timeout=limit)
    # torch 2.15 has made this public, and warns of the private name.
    set_timeout = getattr(dist, "set_timeout", dist.distributed_c10d._set_pg_timeout)
    set_timeout(FOREVER, group)
    store = dist.PrefixStore("rawloop", dist.distributed_c10d._get_default_store())  # type: ignore[attr-defined]
    return replace(world, waiting=Waiting(store, rank, size, limit.total_seconds()), group=group)


@contextmanager
def open_world(device: str = "auto", timeout: float = 600.0) -> Iterator[World]:
    """Join the process group that torchrun describes and leave it at the end. A single process joins none.

    Args:
        device: `auto`, `cuda`, `mps` or `cpu`.
        timeout: seconds that a collective may wait.

    Raises:
        UserError: the device does not exist, or the environment describes no group.
        RawloopError: the other processes cannot be met.
        LostRank: another process has gone, or did not come in time; raised in place of torch's error.
    """
    rank, size, local_rank = read_ranks()
    world = World(rank, size, local_rank, choose_device(device, local_rank, size), *read_launch())
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    if size == 1 or dist.is_initialized():
        yield world if size == 1 else World.current()
        return
    join_group(world.device, rank, size, world.restarts, timeout)
    world = World.current()
    assert world.waiting is not None
    try:
        yield world
    except BaseException as error:
        # Destroying the group waits for its collectives, for ever if another rank does not come, and closing it ends
        # the others, and then the launcher this rank: its own message comes first, at exit the group is aborted.
        atexit.register(_abort)
        if is_lost_rank(error) and isinstance(error, RuntimeError):
            raise world.waiting.explain(error) from error
        if advice := nccl_advice(error):
            error.add_note(advice)
        raise
    # gloo's threads need the GIL to let go of the last collective's tensors. One that still waits for it when the
    # interpreter ends aborts the process ("terminate called without an active exception"): let them have it.
    time.sleep(0.1)
    dist.destroy_process_group()


def _abort() -> None:
    """Let a run that has failed leave its process group without waiting for anybody."""
    if not dist.is_initialized():
        return
    for group in (dist.group.WORLD, World.current().group):
        # Its destructor waits for collectives that may never end: it must not run.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
    if "nccl" in dist.get_backend_config():
        (thread := Thread(target=dist.distributed_c10d._abort_process_group, daemon=True)).start()
        thread.join(ABORT)
    time.sleep(0.1)  # for gloo's threads, as above
