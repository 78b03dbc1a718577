"""Outputs of modules that come close to the largest number of their dtype."""

from collections.abc import Iterable

import torch

from rawloop.watch.findings import Cause, Finding, Place
from rawloop.watch.look import Look
from rawloop.watch.subject import Detector, StepRecord, Subject

LEAST = 3.0  # bits between a module's outputs and the largest number of their dtype


class Headroom(Detector):
    """Judges the largest value of each module's outputs."""

    def __init__(self, look: Look) -> None:
        self.look = look
        self._told: set[str] = set()

    def end(self, subject: Subject, record: StepRecord) -> Iterable[Finding]:
        """Name the module that is closest, once for each."""
        seen = self.look.seen(record)
        outputs = seen.outputs.items() if seen is not None else ()
        tight = {name: one for name, one in outputs if one.headroom < LEAST and name not in self._told}
        if not tight:
            return
        self._told |= tight.keys()
        name = min(tight, key=lambda name: round(tight[name].headroom, 1))
        largest, bits, dtype = tight[name].largest, round(tight[name].headroom, 1), tight[name].dtype
        short, limit = str(dtype).removeprefix("torch."), torch.finfo(dtype).max
        cause = Cause(
            "precision",
            f"the largest output of '{name}' is {largest:.4g}, {bits} bits below the limit of {short}",
            Place("forward", module=name),
            {"largest": largest, "limit": limit, "head room in bits": bits, "modules": len(tight)},
            f"Compute '{name}' in float32 or bfloat16, or take a mode of a larger range than {short}",
        )
        others = f", and {len(tight) - 1} more modules" if len(tight) > 1 else ""
        what = f"outputs come close to the limit of {short}{others}"
        yield Finding("headroom", what, (cause,), record.step, subject.world.rank)
