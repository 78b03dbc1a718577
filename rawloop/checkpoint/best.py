"""Which evaluation was the best so far. The number is part of every checkpoint, so a resumed run knows it."""

import math
from typing import Any, Literal, NamedTuple

from rawloop.errors import CheckpointError

Mode = Literal["min", "max"]


class BestRecord(NamedTuple):
    """An evaluation that was better than all before it. `mode` says whether smaller (min) or larger (max) is better."""

    metric: str
    mode: Mode
    value: float
    step: int

    def beats(self, other: "BestRecord | None") -> bool:
        """Whether it has a better value of the same metric; any value beats none."""
        if other is None:
            return True
        better = self.value < other.value if self.mode == "min" else self.value > other.value
        return (self.metric, self.mode) == (other.metric, other.mode) and better

    def reaches(self, other: "BestRecord | None") -> bool:
        """Whether it has the same metric as `other`, and a value that is no worse."""
        return self.beats(other) or (other is not None and self[:3] == other[:3])

    @classmethod
    def read(cls, content: Any) -> "BestRecord | None":
        """Return what a manifest or best.json says; None if it says no such thing."""
        try:
            mode: Mode = "max" if content.get("mode") == "max" else "min"
            return cls(str(content["metric"]), mode, float(content["value"]), int(content["step"]))
        except (AttributeError, KeyError, TypeError, ValueError):
            return None


class BestTracker:
    """Remembers the best valid value of one metric, the step at which it was seen, and how often it was not beaten.

    Args:
        metric: name of the metric.
        mode: whether smaller (min) or larger (max) is better.
        patience: evaluations in a row that may fail to be the best until `exhausted`; 0 never is.
    """

    value: float | None
    step: int | None
    considered: int | None  # the step of the last evaluation: seen again after a resume, it is no other
    worse_in_a_row: int

    def __init__(self, metric: str = "eval_loss", mode: Mode = "min", patience: int = 0) -> None:
        self.metric = metric
        self.mode = mode
        self.patience = patience
        self.forget()

    @property
    def exhausted(self) -> bool:
        """Whether the metric has failed to improve for `patience` evaluations in a row."""
        return 0 < self.patience <= self.worse_in_a_row

    @property
    def record(self) -> BestRecord | None:
        """The best evaluation so far, if there was one."""
        if self.value is None or self.step is None:
            return None
        return BestRecord(self.metric, self.mode, self.value, self.step)

    def consider(self, step: int, value: float, valid: bool) -> bool:
        """Return whether `value` beats everything before it, and remember it then.

        An evaluation that is not valid (`valid` false, or a value that is not finite) is never the best. One of a step
        that was considered last, as after a resume, is not counted again.
        """
        step, value = int(step), float(value)  # numpy's numbers cannot be stored
        if step != self.considered:
            self.worse_in_a_row += 1
        self.considered = step
        if not (valid and math.isfinite(value) and BestRecord(self.metric, self.mode, value, step).beats(self.record)):
            return False
        self.value, self.step = value, step
        self.worse_in_a_row = 0
        return True

    def forget(self) -> None:
        """Start over: no value has been seen whose model still exists."""
        self.value = self.step = self.considered = None
        self.worse_in_a_row = 0

    def agree_with(self, written: BestRecord | None) -> None:
        """Believe a value only if its model was written.

        Args:
            written: the evaluation of the slot that `best` points to. A worse one says that the save of a better one
                failed; a better one is of a continuation that was given up.
        """
        if self.record is None:
            return
        if written is None or (written.metric, written.mode) != (self.metric, self.mode):
            self.forget()
        elif self.record.beats(written):
            self.value, self.step = written.value, written.step

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
