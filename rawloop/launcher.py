"""What the launcher has told this process (RANK, WORLD_SIZE, LOCAL_RANK, restarts), read here alone, and its device."""

import os

import torch

from rawloop.errors import UserError


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
