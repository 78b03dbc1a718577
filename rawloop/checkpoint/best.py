"""Which evaluation was the best so far. The number is part of every checkpoint, so a resumed run knows it."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from rawloop.errors import CheckpointError

Mode = Literal["min", "max"]


class BestTracker:
    """Remembers the best valid value of one metric, the step at which it was seen, and how often it was not beaten.

    Args:
        metric: name of the metric.
        mode: whether smaller (min) or larger (max) is better.
        patience: evaluations in a row that may fail to be the best until `exhausted`; 0 never is.
    """

    def __init__(self, metric: str = "eval_loss", mode: Mode = "min", patience: int = 0) -> None:
        self.metric = metric
        self.mode = mode
        self.patience = patience
        self.worse_in_a_row = 0
        self.value: float | None = None
        self.step: int | None = None
        self.considered: int | None = None  # the step of the last evaluation: seen again after a resume, it is no other

    @property
    def exhausted(self) -> bool:
        """Whether the metric has failed to improve for `patience` evaluations in a row."""
        return 0 < self.patience <= self.worse_in_a_row

    def consider(self, step: int, value: float, valid: bool) -> bool:
        """Return whether `value` beats everything before it, and remember it then.

        An evaluation that is not valid (`valid` false, or a value that is not finite) is never the best. One of a step
        that was considered last, as after a resume, is not counted again.
        """
        step, value = int(step), float(value)  # numpy's numbers cannot be stored
        if step != self.considered:
            self.worse_in_a_row += 1
        self.considered = step
        if not valid or not math.isfinite(value):
            return False
        if self.value is not None and not (value < self.value if self.mode == "min" else value > self.value):
            return False
        self.value, self.step = value, step
        self.worse_in_a_row = 0
        return True

    def forget(self) -> None:
        """Start over: no value has been seen whose model still exists."""
        self.value = self.step = self.considered = None
        self.worse_in_a_row = 0

    def fall_back(self, kept: Mapping[str, Any] | None) -> None:
        """Take the best slot at its word: `kept` is what its manifest says of it, None if there is none.

        A better value has been seen since, whose model could not be written.
        """
        if kept is None or (kept["metric"], kept.get("mode", self.mode)) != (self.metric, self.mode):
            self.value = self.step = None
        else:
            self.value, self.step = kept["value"], kept["step"]

    def agree_with(self, kept: Mapping[str, Any] | None) -> None:
        """Fall back from a value that the best slot does not bear out, when a run is resumed; `kept` as in `fall_back`.

        A slot of an earlier step, or of a later one with a worse value, which would not have taken the place of a
        better one, says that the model of this value was never written. A later and better one is of what was given
        up, or still to come.
        """
        if self.value is None or self.step is None:
            return
        if kept is None or kept["metric"] != self.metric:
            self.fall_back(None)
        elif kept["step"] < self.step:
            self.fall_back(kept)
        elif kept["value"] > self.value if self.mode == "min" else kept["value"] < self.value:
            self.fall_back(None)

    def state_dict(self) -> dict[str, Any]:
        """Return metric, mode, value, step and the count of evaluations since. Patience is the config's."""
        return {
            "metric": self.metric,
            "mode": self.mode,
            "value": self.value,
            "step": self.step,
            "worse_in_a_row": self.worse_in_a_row,
            "considered": self.considered,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore value, step and count.

        Raises:
            CheckpointError: the checkpoint tracked another metric, whose value means nothing here.
        """
        if (state["metric"], state["mode"]) != (self.metric, self.mode):
            raise CheckpointError(
                f"the checkpoint tracks the best {state['metric']} ({state['mode']}), this run is configured for "
                f"{self.metric} ({self.mode}): set evaluation.best_metric and best_mode back, or start "
                "another run from these weights with --init_from CHECKPOINT --output NEW"
            )
        self.value, self.step, self.worse_in_a_row = state["value"], state["step"], state["worse_in_a_row"]
        self.considered = state.get("considered")
