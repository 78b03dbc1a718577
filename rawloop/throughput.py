"""How fast a run trains: what its micro-batches hold, and what share of the device's rate that is.

Everything is counted on the CPU when a batch is made, so no count waits for the device.
"""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from rawloop.contracts import Batch
from rawloop.dist import World


class Cost(NamedTuple):
    """Operations of a step per position of the model's sequence, and what one device can do in a second."""

    operations: float
    peak: float

    def __str__(self) -> str:
        return f"{self.operations / 1e9:.3g} GFLOP per position of {self.peak / 1e12:.0f} TFLOPS"


class Throughput:
    """Measures the speed since its clock was restarted.

    Args:
        audio_rate: how many of a batch's `audio` are a second: frames per second, or 1.
        cost: of a step; None gives no MFU.
    """

    def __init__(self, audio_rate: float = 1.0, cost: Cost | None = None) -> None:
        self.audio_rate, self.cost = audio_rate, cost
        self.restart_clock(0, 0)

    def restart_clock(self, step: int, samples: int) -> None:
        """Restart the clock, so the speed does not include an evaluation or a save."""
        self.since, self.step, self.samples, self.waited = time.perf_counter(), step, samples, 0.0
        self.work: Counter[str] = Counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside the context as a wait for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def count(self, batch: Batch) -> None:
        """Count a micro-batch of this rank."""
        self.work.update(batch.work)

    def speed(self, step: int, samples: int, world: World) -> dict[str, float]:
        """Return what was done per second by all ranks, for metrics.jsonl. All ranks call this.

        `data_wait` is the share of this rank's time that was a wait for data: on a GPU the device computes meanwhile,
        so only a share near 1 slows training. `padding` is the share of positions that are padding. `peak_memory_gb`
        is that of the fullest rank since the last call, in 10^9 bytes.
        """
        seconds = time.perf_counter() - self.since
        shares = world.gather((dict(self.work), _peak_memory(world.device)))
        done = sum((Counter(work) for work, _ in shares), Counter())
        memory = max(most for _, most in shares)
        found = {
            "samples_per_second": (samples - self.samples) / seconds,
            "step_seconds": seconds / max(1, step - self.step),
            "data_wait": self.waited / seconds,
        }
        if done["positions"]:
            tokens = done["tokens"] / seconds
            found |= {"tokens_per_second": tokens, "padding": 1 - done["tokens"] / done["positions"]}
            if self.cost is not None:
                found["mfu"] = tokens * self.cost.operations / (world.size * self.cost.peak)
        if done["audio"]:
            found["audio_seconds_per_second"] = done["audio"] / self.audio_rate / seconds
        return found | ({"peak_memory_gb": memory / 1e9} if memory else {})


def _peak_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    most = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return most
