"""The flight recorder: the last steps, kept by reference, so that a capsule can show how a bad step came about."""

import platform
import sys
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from rawloop.dist import World
from rawloop.versions import installed_versions
from rawloop.watch.findings import Finding
from rawloop.watch.subject import StepRecord

SAID = ("step", "ids", "lr", "scale", "loss", "grad_norm", "applied")


class Kept(NamedTuple):
    """A step that has passed. `rng` are the random streams before it, `lr` is the largest learning rate."""

    step: int
    batch: Any
    ids: tuple[str, ...]
    rng: dict[str, Any]
    lr: float
    scale: float
    loss: float | None
    grad_norm: float | None
    applied: bool | None


class FlightRecorder:
    """Keeps the last steps of a loop. Nothing is copied, and nothing is read from the device."""

    def __init__(self, steps: int) -> None:
        self.steps: deque[Kept] = deque(maxlen=steps)

    def keep(self, record: StepRecord, rng: dict[str, Any], lr: float) -> None:
        """Keep a step that has ended, without its passes."""
        numbers = (record.scale, record.loss, record.grad_norm, record.applied)
        self.steps.append(Kept(record.step, record.batch, record.ids, rng, lr, *numbers))

    def state(self, batch_state: Callable[[Any], Any]) -> dict[str, Any]:
        """Return the steps as nested values that can be stored, each batch as `batch_state` makes it."""
        return {"steps": [{"step": one.step, "rng": one.rng, "batch": batch_state(one.batch)} for one in self.steps]}

    def facts(self, record: StepRecord, world: World, why: str, alarms: Iterable[Finding]) -> dict[str, Any]:
        """Return what the manifest of every capsule says: of this step, why it is kept, and of the steps before."""
        return {
            "why": why,
            "step": record.step,
            "rank": world.rank,
            "world_size": world.size,
            "threads": torch.get_num_threads(),  # sums on the CPU depend on it
            "scale": record.scale,
            "versions": {**installed_versions(), "python": platform.python_version(), "platform": sys.platform},
            "loss": record.loss,
            "grad_norm": record.grad_norm,
            "findings": [finding.as_json() for finding in alarms],
            "history": [{name: getattr(one, name) for name in SAID} for one in self.steps],
        }
