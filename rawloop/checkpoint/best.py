"""The best evaluation so far. It is part of every checkpoint, so a resumed run knows it."""

import math
from typing import Any, Literal, NamedTuple

from rawloop.errors import CheckpointError

Mode = Literal["min", "max"]


class BestRecord(NamedTuple):
    """An evaluation that was the best so far. `mode` says whether smaller (min) or larger (max) is better."""

    metric: str
    mode: Mode
    value: float
    step: int

    def beats(self, other: "BestRecord | None") -> bool:
        """Whether it has a better value of the same metric. Any record beats None."""
        if other is None:
            return True
        better = self.value < other.value if self.mode == "min" else self.value > other.value
        return (self.metric, self.mode) == (other.metric, other.mode) and better

    def reaches(self, other: "BestRecord | None") -> bool:
        """Whether it has the same metric as `other`, and an equal or better value."""
        return self.beats(other) or (other is not None and self[:3] == other[:3])

    @classmethod
    def read(cls, content: Any) -> "BestRecord | None":
        """Return the record in a manifest or best.json; None if it has none."""
        try:
            mode: Mode = "max" if content.get("mode") == "max" else "min"
            return cls(str(content["metric"]), mode, float(content["value"]), int(content["step"]))
        except (AttributeError, KeyError, TypeError, ValueError):
            return None


class BestTracker:
    """Tracks the best valid value of one metric, its step, and the number of evaluations since.

    Args:
        metric: name of the metric.
        mode: whether smaller (min) or larger (max) is better.
        patience: evaluations in a row without a new best value until `exhausted`; 0 means never.
    """

    value: float | None
    step: int | None
    considered: int | None  # the step of the last evaluation, which a resumed run may repeat
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
        """The best evaluation so far, or None."""
        if self.value is None or self.step is None:
            return None
        return BestRecord(self.metric, self.mode, self.value, self.step)

    def consider(self, step: int, value: float, valid: bool) -> bool:
        """Return whether `value` is the best so far, and store it if so.

        An evaluation that is not valid (`valid` is false, or `value` is not finite) is never the best. A second
        evaluation of the same step, as after a resume, is not counted.
        """
        step, value = int(step), float(value)  # numpy's numbers cannot be saved
        if step != self.considered:
            self.worse_in_a_row += 1
        self.considered = step
        if not (valid and math.isfinite(value) and BestRecord(self.metric, self.mode, value, step).beats(self.record)):
            return False
        self.value, self.step = value, step
        self.worse_in_a_row = 0
        return True

    def forget(self) -> None:
        """Start over, as no model of an earlier value exists."""
        self.value = self.step = self.considered = None
        self.worse_in_a_row = 0

    def agree_with(self, written: BestRecord | None) -> None:
        """Take the value of the best checkpoint on disk if it is worse: then the save of a better model has failed.

        Args:
            written: the evaluation of the slot that `best` points to. A better value belongs to a continuation that was
                given up, and is ignored.
        """
        if self.record is None:
            return
        if written is None or (written.metric, written.mode) != (self.metric, self.mode):
            self.forget()
        elif self.record.beats(written):
            self.value, self.step = written.value, written.step

    def state_dict(self) -> dict[str, Any]:
        """Return everything except the patience, which the config sets."""
        return {name: value for name, value in vars(self).items() if name != "patience"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore value, step and count.

        Raises:
            CheckpointError: the checkpoint tracked another metric.
        """
        if (state["metric"], state["mode"]) != (self.metric, self.mode):
            raise CheckpointError(
                f"the checkpoint tracks the best {state['metric']} ({state['mode']}), this run is configured for "
                f"{self.metric} ({self.mode}): set evaluation.best_metric and best_mode back, or start "
                "another run from these weights with --init_from CHECKPOINT --output NEW"
            )
        self.value, self.step, self.worse_in_a_row = state["value"], state["step"], state["worse_in_a_row"]
        self.considered = state.get("considered")
