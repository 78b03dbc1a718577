"""The settings of a watch."""

from dataclasses import dataclass
from typing import Literal

from rawloop.errors import UserError

EARLY = (20, 100)  # most faults are there from the start


@dataclass
class WatchConfig:
    """Watching a run for numbers that go wrong, and keeping what is needed to replay a bad step.

    Args:
        enabled: watch the run. The numbers that are read at every step have been measured anyway.
        every: steps between the costly looks: gradients by module, and digests of the weights. A look takes as long as
            one or two steps of a small model. The first ones come sooner: at the steps 0, 20 and 100.
        steps: the number of last steps that the flight recorder keeps.
        capsules: write at most this many capsules.
        capsule_mb: write no capsule that is larger, in megabytes (10^6 bytes); optimizer state is left out first.
        spikes: what to do if the loss or the gradient norm of a step stands far out of those of the last 100 updates.
            off: nothing. warn: say so, and write a capsule. skip: also drop its update. rollback: also go back to the
            newest checkpoint, and leave out the samples of the step.
        max_spikes: end the run after so many skipped spikes: they are then no exceptions.
    """

    enabled: bool = True
    every: int = 500
    steps: int = 8
    capsules: int = 4
    capsule_mb: int = 2000
    spikes: Literal["off", "warn", "skip", "rollback"] = "off"
    max_spikes: int = 10

    def __post_init__(self) -> None:
        for name in ("every", "steps", "capsules", "capsule_mb", "max_spikes"):
            value, least = getattr(self, name), 0 if name == "capsules" else 1
            if value < least:
                raise UserError(
                    f"watch.{name} is {value}: it must be {least} or more; watch.enabled false turns it off"
                )

    def is_due(self, step: int) -> bool:
        """Return whether a step, counted from 0, takes a look."""
        return step % self.every == 0 or (step in EARLY and step < self.every)
