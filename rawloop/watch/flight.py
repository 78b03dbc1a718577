"""The flight recorder: the last steps, kept by reference, so that a capsule can show how a bad step came about."""

from collections import deque
from typing import Any, NamedTuple

from rawloop.watch.subject import StepRecord


class Kept(NamedTuple):
    """A step that has passed: its numbers, its batch and its ids by reference, and the random streams before it.

    `lr` is the largest learning rate of its update.
    """

    step: int
    batch: Any
    ids: tuple[str, ...]
    rng: dict[str, Any]
    lr: float
    scale: float
    loss: float | None
    grad_norm: float | None
    applied: bool | None

    def numbers(self) -> dict[str, Any]:
        """Return what JSON can hold of the step."""
        return {name: list(value) if name == "ids" else value for name, value in self._asdict().items() if name in SAID}


SAID = ("step", "ids", "lr", "scale", "loss", "grad_norm", "applied")


class FlightRecorder:
    """Keeps the last steps of a loop. Nothing is copied, and nothing is read from the device."""

    def __init__(self, steps: int) -> None:
        self.steps: deque[Kept] = deque(maxlen=steps)

    def keep(self, record: StepRecord, rng: dict[str, Any], lr: float) -> None:
        """Keep a step that has ended."""
        self.steps.append(
            Kept(
                record.step,
                record.batch,
                record.ids,
                rng,
                lr,
                record.scale,
                record.loss,
                record.grad_norm,
                record.applied,
            )
        )

    def scales(self) -> list[float]:
        """Return the loss scales of the steps, the oldest first."""
        return [kept.scale for kept in self.steps]
