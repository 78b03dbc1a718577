"""Ranks, collectives, and DistributedDataParallel (DDP).

`World.current()` describes the process group of torch.distributed, or a single process if there is none. `open_world`
also starts and ends the process group.
"""

import atexit
import gc
import pickle
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import lru_cache, reduce
from inspect import signature
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rawloop.errors import RawloopError, UserError
from rawloop.facts import as_text, differences, in_words
from rawloop.launcher import RESTARTS, abort_groups, choose_device, join_group, read_launch, read_ranks
from rawloop.settings import DDPConfig
from rawloop.sharding import is_sharded, unreduced
from rawloop.waiting import Waiting, is_lost_rank, nccl_advice

FOREVER = timedelta(days=1000)
T = TypeVar("T")
E = TypeVar("E", bound=RawloopError)


@dataclass(frozen=True)
class World:
    """The rank of this process, the number of ranks, its rank on this machine, and its device.

    `launch` is torchrun's run id, "" without torchrun; `restarts` counts how often torchrun has restarted the
    processes. `group` is a gloo group over all ranks: agreements are reduced on the CPU. `alone`: beside others.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    launch: str = ""
    restarts: int = 0
    waiting: Waiting | None = field(default=None, compare=False, repr=False)
    group: Any = field(default=None, compare=False, repr=False)
    alone: bool = False

    @classmethod
    def current(cls) -> "World":
        """Return the world of the current process group, or a single process if there is none.

        The first call after `init_process_group` creates a gloo group, so all ranks must make it. Later calls return
        the same world, as long as the process group is the same.

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
        return cls(0, 1, local_rank, choose_device("auto", local_rank), *read_launch())

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints messages."""
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Sum each value over all ranks, in float64. One all_reduce on the CPU; it does not wait for the device."""
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        self._finish(dist.all_reduce(tensor, group=self.group, async_op=True))
        return list(tensor.tolist())

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, in order of rank, on every rank. For small objects."""
        if self.size == 1:
            return [value]
        content = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = [int(n) for n in self.sum([float(len(content) * (r == self.rank)) for r in range(self.size)])]
        padded = torch.cat([content, content.new_zeros(max(sizes) - len(content))])
        rows = [torch.empty_like(padded) for _ in sizes]
        self._finish(dist.all_gather(rows, padded, group=self.group, async_op=True))
        contents = [row[:size].numpy().tobytes() for row, size in zip(rows, sizes, strict=True)]
        return [pickle.loads(content) for content in contents]  # noqa: S301 (from our own ranks)

    def _finish(self, work: Any) -> None:
        assert self.waiting is not None, "World.current() makes the worlds of several ranks"
        self.waiting.finish(work)

    def make_equal(self, tensors: Sequence[torch.Tensor]) -> None:
        """Make tensors equal on all ranks, in place: the mean for floats, the maximum for other dtypes.

        All ranks pass tensors of the same shapes. The host does not wait for the device.
        """
        for floats in (True, False) if self.size > 1 else ():
            chosen = [tensor for tensor in tensors if tensor.is_floating_point() == floats]
            if not chosen:
                continue
            dtypes = [tensor.dtype for tensor in chosen]
            wide = reduce(torch.promote_types, dtypes, torch.float32) if floats else torch.int64
            flat = torch.cat([tensor.detach().flatten().to(wide) for tensor in chosen])
            operation = dist.ReduceOp.SUM if floats else dist.ReduceOp.MAX
            if flat.device.type == "cpu":
                self._finish(dist.all_reduce(flat, operation, group=self.group, async_op=True))
            else:  # without a timeout, `wait` blocks the device's stream and not the host
                dist.all_reduce(flat, operation, async_op=True).wait()
            flat = flat / self.size if floats else flat
            with torch.no_grad():
                for tensor, values in zip(chosen, torch.split(flat, [t.numel() for t in chosen]), strict=True):
                    tensor.copy_(values.view_as(tensor))

    def any(self, flags: Sequence[bool]) -> Sequence[bool]:
        """Return for each flag whether it is true on any rank. One all_reduce."""
        return flags if self.size == 1 else [count > 0 for count in self.sum([float(flag) for flag in flags])]

    def from_main(self, value: T) -> T:
        """Return rank 0's value on every rank."""
        return self.gather(value)[0]

    def on_all_ranks(self, work: Callable[[], T], only_main: bool = False) -> T | None:
        """Run `work` on every rank (or on rank 0 only). If it fails on any rank, raise on all of them.

        All ranks call this. The others wait for a rank that works for longer than ddp.timeout.

        Raises:
            RawloopError: the first failing rank's error; on the other ranks a copy that names that rank.
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
        failures = self.gather(_describe(error) if error else None)
        rank = next((rank for rank, failure in enumerate(failures) if failure), None)
        if rank is None:
            return result
        if error is not None and self.rank == rank:
            raise self.raised_on_all(error) if isinstance(error, RawloopError) else error
        kind, failed, message = failures[rank] or (RawloopError, "", "")
        name = f"rank {rank}{failed}: " if rank or failed else ""
        raise self.raised_on_all(kind(f"{name}{message}")) from error

    def working(self) -> AbstractContextManager[None]:
        """While inside, tell the other ranks that this rank is working: they wait beyond ddp.timeout."""
        return self.waiting.working() if self.waiting else nullcontext()

    def raised_on_all(self, error: E) -> E:
        """Mark an error that all ranks raise: only rank 0 prints it."""
        error.is_reporter = self.is_main
        return error

    def check_equal(self, facts: Mapping[str, Any], advice: str = "start all processes alike") -> None:
        """Check that facts, such as settings and digests of data, are the same on all ranks. All ranks call this.

        Args:
            facts: name -> a small value that JSON can hold.
            advice: how to fix a difference.

        Raises:
            UserError: on all ranks, with the first three differences.
        """
        if found := in_words(differences(self.gather(as_text(facts)))):
            raise self.raised_on_all(UserError(f"the ranks differ: {found}: {advice}"))

    def wrap(self, module: nn.Module, config: DDPConfig | None = None) -> nn.Module:
        """Wrap any module in DDP; return the module itself in a single process, or if it is sharded.

        With `find_unused_parameters` off, `PrecisionPolicy.step` ends the run if a trained weight got no gradient: DDP
        would hang, or the ranks' weights would diverge.
        """
        if self.size == 1 or is_sharded(module):
            return module
        config = config or DDPConfig()
        # torch 2.13 renames broadcast_buffers and warns about the old name
        renamed = "forward_sync_buffers" in signature(DistributedDataParallel.__init__).parameters
        buffers: Any = {"forward_sync_buffers" if renamed else "broadcast_buffers": config.broadcast_buffers}
        return DistributedDataParallel(
            module,
            find_unused_parameters=bool(config.find_unused_parameters),  # "auto" searches
            gradient_as_bucket_view=config.gradient_as_bucket_view,
            static_graph=config.static_graph,
            **buffers,
        )


def unwrap_ddp(module: nn.Module) -> nn.Module:
    """Return the module inside DDP, or the module itself if it is not DDP."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def find_ddp(weights: Iterable[nn.Parameter]) -> list[DistributedDataParallel]:
    """Find the DDP modules over any of these weights, whoever has built them (accelerate, Fabric, your own script)."""
    wanted = {id(weight) for weight in weights}
    kinds = [DistributedDataParallel, *DistributedDataParallel.__subclasses__()]
    # neither the weights nor the module inside refer to their DDP module, but each instance refers to its class
    found = [thing for kind in kinds for thing in gc.get_referrers(kind) if type(thing) is kind]
    return [ddp for ddp in found if any(id(weight) in wanted for weight in ddp.parameters())]


def no_sync(module: nn.Module, wanted: bool) -> AbstractContextManager[Any]:
    """If `wanted`, return a context in which DDP or a sharded module reduces no gradients; else one without effect."""
    if wanted and isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return unreduced(module) if wanted and hasattr(module, "set_requires_gradient_sync") else nullcontext()


def _describe(error: Exception) -> tuple[type[RawloopError], str, str]:
    """Return the type that the other ranks raise for this error, the words after `rank N`, and the message."""
    if not isinstance(error, RawloopError):
        return RawloopError, " failed", f"{type(error).__name__}: {error}"
    # A subclass from elsewhere may be unknown to the others, or take other arguments.
    kind = next(kind for kind in type(error).__mro__ if kind.__module__ == RawloopError.__module__)
    return kind, "", str(error)


@lru_cache(maxsize=1)  # the last process group's: all parts of a process share one world and its gloo group
def _world_of(default: Any) -> World:
    """Describe the default process group. All ranks call it together."""
    # If a DDP module is the last to hold a gloo group, its reducer destroys the group with the GIL held, while gloo's
    # thread waits for the GIL: a deadlock at exit. This reference keeps the group until the interpreter ends.
    atexit.register(id, default)
    rank, size = dist.get_rank(), dist.get_world_size()
    on_gpus = "nccl" in dist.get_backend_config(default)
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpus else torch.device("cpu")
    launch, restarts = read_launch()
    store = dist.distributed_c10d._get_default_store()
    if store.check([RESTARTS]):  # the launchers of several machines may count differently
        restarts = int(store.get(RESTARTS))
    world = World(rank, size, read_ranks()[2], device, launch, restarts)
    if size == 1:
        return world
    options = getattr(default._get_backend(default._device_types[0]), "options", None)  # not every backend has them
    limit = options._timeout if options else dist.default_pg_timeout
    # Agreements have their own group: NCCL cannot reduce CPU tensors. `Waiting` sets its time limits, because a rank
    # may work for longer than ddp.timeout.
    group = dist.new_group(backend="gloo", timeout=limit)
    # torch 2.15 has made this public, and warns of the private name.
    set_timeout = getattr(dist, "set_timeout", dist.distributed_c10d._set_pg_timeout)
    set_timeout(FOREVER, group)
    notes = dist.PrefixStore("rawloop", store)  # type: ignore[attr-defined]
    return replace(world, waiting=Waiting(notes, rank, size, limit.total_seconds()), group=group)


@contextmanager
def open_world(device: str = "auto", timeout: float = 600.0) -> Iterator[World]:
    """Join the process group that torchrun describes, and leave it at the end. A single process joins none.

    Args:
        device: `auto`, `cuda`, `mps` or `cpu`.
        timeout: seconds that a collective may wait.

    Raises:
        UserError: the device does not exist, or the environment describes no group.
        RawloopError: the other processes cannot be reached.
        LostRank: another process has ended, or did not come in time; raised in place of torch's error.
    """
    rank, size, local_rank = read_ranks()
    chosen = choose_device(device, local_rank, size)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size == 1 or dist.is_initialized():
        yield World(rank, 1, local_rank, chosen, *read_launch()) if size == 1 else World.current()
        return
    join_group(chosen, rank, size, timeout)
    world = World.current()
    assert world.waiting is not None
    try:
        yield world
    except BaseException as error:
        # Destroying the group waits for its collectives, without end if a rank is missing. Closing it ends the other
        # ranks, and then the launcher ends this one. So this rank prints its message first, and aborts at exit.
        atexit.register(abort_groups, dist.group.WORLD, world.group)
        if is_lost_rank(error) and isinstance(error, RuntimeError):
            raise world.waiting.explain(error) from error
        if advice := nccl_advice(error):
            error.add_note(advice)
        raise
    # gloo's threads need the GIL to free the last collective's tensors. A thread that still waits for it at the
    # interpreter's end aborts the process ("terminate called without an active exception").
    time.sleep(0.1)
    dist.destroy_process_group()
