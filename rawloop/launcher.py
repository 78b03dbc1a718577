"""The launcher's variables (RANK, WORLD_SIZE, LOCAL_RANK, restarts), read here alone; a process's device and group."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from rawloop.errors import RawloopError, UserError


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


def join_group(device: torch.device, rank: int, size: int, restarts: int, timeout: float) -> None:
    """Initialise the process group that the environment describes.

    Raises:
        UserError: the environment describes none.
        RawloopError: the other processes cannot be met.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    limit = timedelta(seconds=timeout)
    try:
        # After a restart torchrun's store still holds the addresses of the dead: look under a name of our own.
        store, *_ = next(dist.rendezvous("env://", rank, size, timeout=limit))  # type: ignore[attr-defined]
        store = dist.PrefixStore(f"restart-{restarts}", store)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    except ValueError as error:
        raise UserError(f"RANK and WORLD_SIZE are set, but no group: {error}; start with torchrun") from error
    except dist.DistError as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RawloopError(
            f"rank {rank} cannot meet the others at {place} within {timeout:g} s (ddp.timeout): "
            f"{str(error).splitlines()[0]}"
        ) from error
