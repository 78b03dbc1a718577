"""How a process starts: the launcher's variables (RANK, WORLD_SIZE, ...), read only here; its device; its group."""

import ctypes
import os
import sys
import time
from datetime import timedelta
from functools import partial
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist

from rawloop.errors import LostRank, RawloopError, UserError
from rawloop.meeting import Meeting, ask_store, wait_for_listener

ABORT = 5.0  # seconds that aborting a process group may take
RESTARTS = "restarts"  # key in the store of a process group: how often its processes have been restarted
ALL_FOUR = (
    "start the processes with torchrun, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT (and LOCAL_RANK) for each"
)


def choose_device(wanted: str, local_rank: int, size: int = 1) -> torch.device:
    """Return the device of this process: `wanted`, or for `auto` the GPU of its local rank, else MPS, else the CPU.

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
    """Return (rank, world size, local rank) as torchrun sets them; (0, 1, 0) without torchrun.

    Raises:
        UserError: they are no numbers, or do not fit each other.
    """
    read = os.environ.get
    try:
        rank, size, local_rank = int(read("RANK", "0")), int(read("WORLD_SIZE", "1")), int(read("LOCAL_RANK", "0"))
    except ValueError as error:
        raise UserError(f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers: {error}") from error
    if size > 1 and "RANK" not in os.environ:
        raise UserError(f"WORLD_SIZE is {size} and RANK is not set: {ALL_FOUR}")
    if not 0 <= rank < size:
        given = f"WORLD_SIZE is {size}" if "WORLD_SIZE" in os.environ else "WORLD_SIZE is not set"
        raise UserError(f"RANK is {rank} and {given}: ranks count from 0 to WORLD_SIZE - 1; {ALL_FOUR}")
    if local_rank < 0:
        raise UserError(f"LOCAL_RANK is {local_rank}: it counts the processes of a machine from 0")
    return rank, size, local_rank


def read_place(rank: int, size: int) -> tuple[str, int]:
    """Return the host and the port at which the ranks meet, as torchrun sets them.

    Raises:
        UserError: they are missing or wrong.
    """
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    for name, value in (("MASTER_ADDR", host), ("MASTER_PORT", port)):
        if not value:
            raise UserError(f"RANK is {rank}, WORLD_SIZE is {size} and {name} is not set: {ALL_FOUR}")
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"MASTER_PORT is '{port}': it must be a number from 1 to 65535")
    return host, int(port)


def local_size() -> int:
    """Return the number of processes on this machine as torchrun sets it, or WORLD_SIZE without it."""
    size = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(size) if size.isdecimal() else read_ranks()[1]


def num_processes() -> int:
    """Return the size of the process group, or WORLD_SIZE if there is no group yet."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else read_ranks()[1]


def read_launch() -> tuple[str, int]:
    """Return (name of the launch, number of restarts) as torchrun sets them; ("", 0) without torchrun."""
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if not count.isdecimal():
        raise UserError(f"TORCHELASTIC_RESTART_COUNT is '{count}': it must be a whole number")
    return os.environ.get("TORCHELASTIC_RUN_ID", ""), int(count)


def join_group(device: torch.device, rank: int, size: int, timeout: float) -> None:
    """Initialise the process group that the environment describes, once all ranks have come.

    Raises:
        UserError: the environment describes none.
        LostRank: a rank did not come.
        RawloopError: the other processes cannot be reached.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    host, port = read_place(rank, size)
    try:
        store = _open_store(host, port, rank, size, timeout)
        start, restarts = Meeting(store, rank, size, timeout).meet(read_launch()[1])
        store = dist.PrefixStore(start, store)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
        dist.distributed_c10d._get_default_store().set(RESTARTS, str(restarts))
    except LostRank:
        raise
    except RawloopError as error:
        raise RawloopError(f"rank {rank} cannot meet the others: {error}") from error
    except RuntimeError as error:  # torch's DistError and gloo's errors are of this kind
        raise RawloopError(f"rank {rank} cannot meet the others at {host}:{port}: {_why(error)}") from error


def _open_store(host: str, port: int, rank: int, size: int, timeout: float) -> Any:
    """Host the store as rank 0, or connect to it. Under torchrun its agent hosts it."""
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    options: dict[str, Any] = {"timeout": timedelta(seconds=timeout), "wait_for_workers": False, "multi_tenant": True}
    connect = partial(dist.TCPStore, host, port, size, hosts, **options)  # type: ignore[attr-defined]
    if hosts:
        return connect()
    speaks = read_ranks()[2] == 0
    wait_for_listener(host, port, timeout, lambda line: print(line, file=sys.stderr, flush=True) if speaks else None)
    return ask_store(connect, f"{host}:{port}")


def _why(error: Exception) -> str:
    """Return the first line of torch's error, or what to do if that is known."""
    text = str(error).splitlines()[0]
    if "EADDRINUSE" in text:
        return "another program of this machine has this port: choose another MASTER_PORT"
    if "gloo" in text:
        here = os.environ.get("GLOO_SOCKET_IFNAME", "not set")
        return f"{text}: set GLOO_SOCKET_IFNAME ({here} here) on every machine to the network interface between them"
    return text


def abort_groups(*groups: object) -> None:
    """Leave the process groups of a failed run without waiting for the other ranks."""
    if not dist.is_initialized():
        return
    for group in groups:
        # Its destructor waits for collectives that may never end: an extra reference keeps it from running.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
    if "nccl" in dist.get_backend_config():
        (thread := Thread(target=dist.distributed_c10d._abort_process_group, daemon=True)).start()
        thread.join(ABORT)
    time.sleep(0.1)  # gloo's threads need the GIL, as at the end of `open_world`
