"""The losses between two log lines: summed on the device, read there only when a line is written, saved in between."""

import time
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from rawloop.contracts import StreamLoss
from rawloop.dist import World
from rawloop.losses import joined


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
        """Add one micro-batch, whose streams, and the parts of these, need not be those of the others."""
        for stream, loss in losses.items():
            total, counts = loss.total.detach(), [loss.targets, *loss.part_targets]
            if stream in self.totals:
                total = self.totals[stream].to(total.device) + total
            self.totals[stream] = total
            self.targets[stream] = list(map(sum, zip_longest(self.targets.get(stream, []), counts, fillvalue=0)))
            if loss.parts is not None:
                self.parts[stream] = _added(self.parts.get(stream), loss.parts)

    def take(self, world: World) -> dict[str, float]:
        """Return the mean nats per target of every stream and part that had any, over all ranks, and start over.

        Ranks may have met other streams: sums are joined by name, in float64.
        """
        own: dict[str, tuple[float, int]] = {}
        for stream, total in self.totals.items():
            sums = [total.item(), *(self.parts[stream].tolist() if stream in self.parts else [])]
            names = [f"loss/{stream}", *(f"loss/{stream}/{part}" for part in range(len(sums) - 1))]
            own |= dict(zip(names, zip(sums, self.targets[stream], strict=True), strict=True))
        self.start_afresh()
        means = joined(world.gather(own)).items()
        return {name: total / count for name, (total, count) in means if count}

    def state_dict(self) -> dict[str, Any]:
        """Return the sums and counts since the last line."""
        return {"totals": dict(self.totals), "parts": dict(self.parts), "targets": dict(self.targets)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on summing from there; the first micro-batch takes the sums to its device."""
        self.totals, self.parts, self.targets = dict(state["totals"]), dict(state["parts"]), dict(state["targets"])

    def start_afresh(self, step: int = 0) -> None:
        """Forget the sums."""
        self.totals, self.parts, self.targets = {}, {}, {}


def _added(known: Tensor | None, parts: Tensor) -> Tensor:
    """Sums of parts, by their number; the shorter row has zeros for what it lacks."""
    if known is None:
        return parts
    longer = max(len(known), len(parts))
    return pad(known.to(parts.device), (0, longer - len(known))) + pad(parts, (0, longer - len(parts)))
