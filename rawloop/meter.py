"""The losses between two log lines: summed on the device, read there only when a line is written, saved in between."""

import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rawloop.contracts import StreamLoss
from rawloop.dist import World


class Meter:
    """Sums this rank's losses since the last line, and measures the speed.

    As a part of a checkpoint it lets a run that was stopped between two lines write the second one as if it had not
    been. `per_rank` tells the checkpoint manager to store one for every rank.
    """

    per_rank = True

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}  # nats, by stream
        self.parts: dict[str, Tensor] = {}  # nats of each of its parts, such as codebooks
        self.targets: dict[str, list[int]] = {}  # of the stream, then of each part
        self.restart_clock(0)

    def restart_clock(self, samples: int) -> None:
        """Leave out of the speed what has passed since the last line: an evaluation, a save."""
        self.since, self.samples = time.perf_counter(), samples

    def speed(self, samples: int) -> float:
        """Samples per second since the clock was restarted."""
        return (samples - self.samples) / (time.perf_counter() - self.since)

    def add(self, losses: Mapping[str, StreamLoss]) -> None:
        """Add one micro-batch."""
        for stream, loss in losses.items():
            total, counts = loss.total.detach(), [loss.targets, *loss.part_targets]
            seen = stream in self.totals
            self.totals[stream] = self.totals[stream].to(total.device) + total if seen else total
            self.targets[stream] = [a + b for a, b in zip(self.targets[stream], counts)] if seen else counts
            if loss.parts is not None:
                self.parts[stream] = self.parts[stream].to(total.device) + loss.parts if seen else loss.parts

    def take(self, world: World) -> dict[str, float]:
        """Return the mean nats per target of every stream and part that had any, over all ranks, and start over.

        One reduction, in float64.
        """
        names, sums, counts = [], [], []
        for stream, total in self.totals.items():
            parts = self.parts[stream].tolist() if stream in self.parts else []
            names += [f"loss/{stream}", *(f"loss/{stream}/{part}" for part in range(len(parts)))]
            sums += [total.item(), *parts]
            counts += self.targets[stream]
        reduced = world.sum([*sums, *map(float, counts)])
        pairs = zip(names, reduced[: len(names)], reduced[len(names) :], strict=True)
        self.start_afresh()
        return {name: value / count for name, value, count in pairs if count}

    def state_dict(self) -> dict[str, Any]:
        """Return the sums and counts since the last line."""
        return {"totals": dict(self.totals), "parts": dict(self.parts), "targets": dict(self.targets)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on summing from there; the first micro-batch takes the sums to its device."""
        self.totals, self.parts, self.targets = dict(state["totals"]), dict(state["parts"]), dict(state["targets"])

    def start_afresh(self, step: int = 0) -> None:
        """Forget the sums."""
        self.totals, self.parts, self.targets = {}, {}, {}
