"""How a process starts: the launcher's variables (RANK, WORLD_SIZE, ...), read only here; its device; its group."""

import ctypes
import os
import time
from datetime import timedelta
from threading import Thread

import torch
import torch.distributed as dist

from rawloop.errors import RawloopError, UserError

ABORT = 5.0  # seconds that aborting a process group may take


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
    """Return (rank, world size, local rank) as torchrun sets them; (0, 1, 0) without torchrun."""
    read = os.environ.get
    try:
        return int(read("RANK", "0")), int(read("WORLD_SIZE", "1")), int(read("LOCAL_RANK", "0"))
    except ValueError as error:
        raise UserError(f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers: {error}") from error


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
    """Initialise the process group that the environment describes.

    Raises:
        UserError: the environment describes none.
        RawloopError: the other processes cannot be reached.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    limit = timedelta(seconds=timeout)
    try:
        store, *_ = next(dist.rendezvous("env://", rank, size, timeout=limit))  # type: ignore[attr-defined]
        # After a restart torchrun's store still holds the addresses of the dead processes: use another prefix.
        store = dist.PrefixStore(f"restart-{read_launch()[1]}", store)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    except ValueError as error:
        raise UserError(f"RANK and WORLD_SIZE are set, but no group: {error}; start with torchrun") from error
    except dist.DistError as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RawloopError(
            f"rank {rank} cannot meet the others at {place} within {timeout:g} s (ddp.timeout): "
            f"{str(error).splitlines()[0]}"
        ) from error


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
