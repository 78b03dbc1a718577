"""Which evaluation was the best so far. The number is part of every checkpoint, so a resumed run knows it."""

import math
from typing import Any, Literal

from rawloop.errors import CheckpointError

Mode = Literal["min", "max"]


class BestTracker:
    """Remembers the best valid value of one metric and the step at which it was seen."""

    def __init__(self, metric: str = "eval_loss", mode: Mode = "min") -> None:
        self.metric = metric
        self.mode = mode
        self.value: float | None = None
        self.step: int | None = None

    def consider(self, step: int, value: float, valid: bool) -> bool:
        """Return whether `value` beats everything before it, and remember it then.

        An evaluation that is not valid (`valid` false, or a value that is not finite) is never the best.
        """
        if not valid or not math.isfinite(value):
            return False
        if self.value is not None and not (value < self.value if self.mode == "min" else value > self.value):
            return False
        self.value, self.step = value, step
        return True

    def forget(self) -> None:
        """Start over: no value has been seen whose model still exists."""
        self.value = self.step = None

    def state_dict(self) -> dict[str, Any]:
        """Return metric, mode, value and step."""
        return {"metric": self.metric, "mode": self.mode, "value": self.value, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore value and step.

        Raises:
            CheckpointError: the checkpoint tracked another metric, whose value means nothing here.
        """
        if (state["metric"], state["mode"]) != (self.metric, self.mode):
            raise CheckpointError(
                f"the checkpoint tracks the best {state['metric']} ({state['mode']}), this run is configured for "
                f"{self.metric} ({self.mode}): set the metric back, or start a run of its own"
            )
        self.value, self.step = state["value"], state["step"]
