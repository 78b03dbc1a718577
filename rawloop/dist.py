"""Ranks and collectives: the only reader of the launcher's variables (RANK, WORLD_SIZE, LOCAL_RANK, those of torchrun's
restarts), the only user of torch.distributed.

`World.current()` describes the processes that torch.distributed knows, or a single process where it is not initialised.
`open_world` starts and ends the process group as well.
"""

import atexit
import json
import os
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import lru_cache, reduce
from inspect import signature
from typing import Any, NamedTuple, TypeVar
from weakref import ref

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rawloop.errors import RawloopError, UserError
from rawloop.settings import DDPConfig as DDPConfig
from rawloop.waiting import Waiting

T = TypeVar("T")
E = TypeVar("E", bound=RawloopError)


class Wrapped(NamedTuple):
    """A module that `World.wrap` has put into DDP, and with which switches. It is None once it is gone."""

    module: ref[nn.Module]
    config: DDPConfig


@dataclass(frozen=True)
class World:
    """One process among `size`: its rank, its rank on this machine, and its device.

    `launch` names the launcher's run, "" without torchrun; `restarts` counts how often it has started its processes
    again after one of them had died. `group` is a gloo group over all ranks, for agreements between CPUs. `wrapped`
    lists what `wrap` has put into DDP.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    launch: str = ""
    restarts: int = 0
    waiting: Waiting | None = field(default=None, compare=False, repr=False)
    group: Any = field(default=None, compare=False, repr=False)
    wrapped: list[Wrapped] = field(default_factory=list, compare=False, repr=False)

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
        result: list[float] = tensor.tolist()
        return result

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

        No rank is left waiting in a collective for one that has failed.

        Raises:
            RawloopError: the first failing rank's own error; other ranks' copies name that rank.
        """
        result: T | None = None
        error: RawloopError | None = None
        if self.is_main or not only_main:
            try:
                result = work()
            except RawloopError as caught:
                error = caught
            except OSError as caught:  # a failing disk on one rank must not leave the others waiting
                error = RawloopError(f"{type(caught).__name__}: {caught}")
        kinds = self.gather(None if error is None else (type(error), str(error)))
        failed = [(rank, kind) for rank, kind in enumerate(kinds) if kind is not None]
        if not failed:
            return result
        rank, (kind, message) = failed[0]
        raised = error
        if raised is None or self.rank != rank:
            raised = kind(message if rank == 0 else f"rank {rank}: {message}")
        raise self.raised_on_all(raised)

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

        `wrapped` keeps a note of it. With `find_unused_parameters` off, `PrecisionPolicy.step` ends the run where a
        trained weight got no gradient: DDP would wait for ever, or let the ranks drift apart.
        """
        if self.size == 1:
            return module
        config = config or DDPConfig()
        self.wrapped[:] = [other for other in self.wrapped if other.module() not in (None, module)]
        self.wrapped.append(Wrapped(ref(module), config))
        # torch 2.13 renames broadcast_buffers and warns about the old name
        renamed = "forward_sync_buffers" in signature(DistributedDataParallel.__init__).parameters
        buffers: Any = {"forward_sync_buffers" if renamed else "broadcast_buffers": config.broadcast_buffers}
        return DistributedDataParallel(
            module,
            find_unused_parameters=bool(config.find_unused_parameters),
            gradient_as_bucket_view=config.gradient_as_bucket_view,
            static_graph=config.static_graph,
            **buffers,
        )


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def unwrap_ddp(module: nn.Module) -> nn.Module:
    """What DDP wraps, or the module itself where there is no DDP."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def no_sync(module: nn.Module, wanted: bool) -> AbstractContextManager[Any]:
    """Context in which a DDP module keeps its gradients local, if `wanted` and if it is DDP at all."""
    if wanted and isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return nullcontext()


def choose_device(wanted: str, local_rank: int, size: int = 1) -> torch.device:
    """Return the device for this process: `wanted`, or for `auto` its own GPU, else MPS, else the CPU.

    Raises:
        UserError: the device does not exist on this machine.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if wanted not in ("cuda", "mps", "cpu"):
        raise UserError(f"device is '{wanted}': it must be auto, cuda, mps or cpu; CUDA_VISIBLE_DEVICES chooses GPUs")
    if wanted == "cuda":
        found = torch.cuda.device_count()
        if not found:
            raise UserError("device is 'cuda', and torch sees no GPU here: use 'auto' or 'cpu', or mend the driver")
        if local_rank >= found:
            raise UserError(
                f"device is 'cuda' and this process is number {local_rank} on its machine, which has {found} GPU(s): "
                f"start at most {found} process(es) per machine, or set device to 'cpu'"
            )
        return torch.device("cuda", local_rank)
    if wanted == "mps" and size > 1:
        raise UserError(f"device is 'mps' and there are {size} processes: gloo has no MPS; start one, or use 'cpu'")
    if wanted == "mps" and not torch.backends.mps.is_available():
        raise UserError("device is 'mps', which this machine or this build of torch does not have: use 'auto' or 'cpu'")
    return torch.device(wanted)


def read_ranks() -> tuple[int, int, int]:
    """Return (rank, world size, local rank) as torchrun sets them; (0, 1, 0) without torchrun."""
    try:
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        return rank, size, int(os.environ.get("LOCAL_RANK", "0"))
    except ValueError as error:
        raise UserError(f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers: {error}") from error


def read_launch() -> tuple[str, int]:
    """Return (name of the launch, number of restarts) as torchrun sets them; ("", 0) without torchrun."""
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if not count.isdecimal():
        raise UserError(f"TORCHELASTIC_RESTART_COUNT is '{count}': it must be a whole number")
    return os.environ.get("TORCHELASTIC_RUN_ID", ""), int(count)


def is_lost_rank(error: Exception) -> bool:
    """Whether an error says that another rank has gone or did not come."""
    signs = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "NCCL")
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)


def _hold(group: object) -> None:
    """Called at exit with what was held until then."""


@lru_cache(maxsize=1)  # the last process group's: all parts of a process share one world and its gloo group
def _world_of(default: Any) -> World:
    """Describe the default process group. All ranks call it together."""
    # A DDP module that outlives its group would be the last to hold it, and its reducer destroys it with the GIL held
    # while gloo's thread waits for the GIL: a deadlock at exit. Held until the interpreter ends, the group is destroyed
    # by its own binding, which lets go of the GIL.
    atexit.register(_hold, default)
    rank, size = dist.get_rank(), dist.get_world_size()
    on_gpus = "nccl" in dist.get_backend_config(default)
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpus else torch.device("cpu")
    world = World(rank, size, read_ranks()[2], device, *read_launch())
    if size == 1:
        return world
    options = getattr(default._get_backend(default._device_types[0]), "options", None)  # not every backend has them
    limit = options._timeout if options else dist.default_pg_timeout
    # Agreements have a group of their own: a plain NCCL group cannot reduce CPU tensors.
    group = dist.new_group(backend="gloo", timeout=limit)
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
    if size == 1:
        yield world
        return
    world = _join(world, timeout)
    assert world.waiting is not None
    try:
        yield world
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        raise world.waiting.explain(error) from error
    finally:
        # gloo's threads need the GIL to let go of the last collective's tensors. One that still waits for it when the
        # interpreter ends aborts the process ("terminate called without an active exception"): let them have it.
        time.sleep(0.1)
        dist.destroy_process_group()


def _join(world: World, timeout: float) -> World:
    """Initialise the process group that the environment describes."""
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    limit = timedelta(seconds=timeout)
    try:
        # After a restart torchrun's store still holds the addresses of the dead: look under a name of our own.
        store, *_ = next(dist.rendezvous("env://", world.rank, world.size, timeout=limit))  # type: ignore[attr-defined]
        store = dist.PrefixStore(f"restart-{world.restarts}", store)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=limit)
        return World.current()
    except ValueError as error:
        raise UserError(f"RANK and WORLD_SIZE are set, but no group: {error}; start with torchrun") from error
    except dist.DistError as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RawloopError(
            f"rank {world.rank} cannot meet the others at {place} within {timeout:g} s (ddp.timeout): "
            f"{str(error).splitlines()[0]}"
        ) from error
