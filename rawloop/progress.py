"""What a person follows while a run trains: a bar in a terminal, else a line per log step and per evaluation."""

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

from tqdm import tqdm

SLOW = 3.0  # seconds after which a piece of work gets a bar of its own
# The metrics of a line, and their format. The first ones stay where a terminal is narrow.
SHOWN = {
    "loss": "loss {:.4f}",
    "eval_loss": "eval_loss {:.4f}",
    "left": "left {}",
    "lr": "lr {:.3g}",
    "grad_norm": "grad_norm {:.3g}",
    "samples_per_second": "{:.1f} samples/s",
    "tokens_per_second": "{:.0f} tokens/s",
    "mfu": "MFU {:.0%}",
    "data_wait": "data {:.0%}",
}


class Progress:
    """Shows the progress of training on one rank.

    Args:
        total: steps of the run; None if unknown.
        initial: steps that are done.
        log: called with each line; None shows nothing.
        bar: show a bar on stderr instead of a line per log step. Evaluations get a line in any case.
        evaluate_every: steps between evaluations, for the time that is left; None without.
    """

    def __init__(
        self,
        total: int | None,
        initial: int = 0,
        *,
        log: Callable[[str], object] | None = None,
        bar: bool = False,
        evaluate_every: int | None = None,
    ) -> None:
        self.total, self.log, self.every = total, log, evaluate_every
        form = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
        self._bar = tqdm(total=total, initial=initial, disable=not bar, mininterval=0.5, unit="step", bar_format=form)
        self._last: dict[str, Any] = {}  # metrics of the last line, and of the last evaluation
        self._estimated = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()

    def move_to(self, step: int) -> None:
        """Show that this many steps are done; fewer than before, if a run goes back."""
        if step >= self._bar.n:
            self._bar.update(step - self._bar.n)
        else:
            self._bar.n = step

    def show(self, step: int, values: Mapping[str, Any]) -> None:
        """Show the metrics of a log step or of an evaluation."""
        if self.log is None or not {"loss", "eval_loss"} & values.keys():
            return
        evaluated = "eval_loss" in values
        self._last |= values
        left = self.seconds_left(step)
        ends = {"left": duration(left)} if left else {}
        if evaluated or self._bar.disable:
            place = f"step {step}" if self.total is None else f"step {step}/{self.total}"
            shown = _shown(values if evaluated else {**values, **ends})
            self.log("  ".join([place, *shown]))  # step 120/60000  loss 4.3520  left 83 min  lr 1.2e-05
        self._bar.set_postfix_str(", ".join(_shown({**self._last, **ends})), refresh=evaluated)
        if left and not self._estimated and not evaluated:
            self._estimated = True
            self.log(f"about {duration(left)} to the end: {self._costs(step)}")

    def seconds_left(self, step: int) -> float | None:
        """Return the seconds from `step` to the end, evaluations among them; None before the first line."""
        if self.total is None or "step_seconds" not in self._last:
            return None
        evaluations = self._evaluations_left(step) * self._last.get("eval_seconds", 0.0)
        return float((self.total - step) * self._last["step_seconds"] + evaluations)

    def _evaluations_left(self, step: int) -> int:
        if self.every is None or self.total is None or step >= self.total:
            return 0
        return self.total // self.every - step // self.every + (self.total % self.every > 0)

    def _costs(self, step: int) -> str:
        assert self.total is not None
        parts = [_times(self.total - step, "step", self._last["step_seconds"])]
        if "eval_seconds" in self._last and (evaluations := self._evaluations_left(step)):
            parts.append(_times(evaluations, "evaluation", self._last["eval_seconds"]))
        return ", ".join(parts)


def _times(number: int, what: str, seconds: float) -> str:
    return f"{number} {what}{'' if number == 1 else 's'} of {seconds:.3g} s"


def _shown(values: Mapping[str, Any]) -> list[str]:
    return [
        text.format(values[name]) for name, text in SHOWN.items() if isinstance(values.get(name), float | int | str)
    ]


def duration(seconds: float) -> str:
    """Return a time as people read it, such as `3 h 20 min`."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def slow_bar(things: Iterable[Any], what: str, shown: bool) -> Iterable[Any]:
    """Iterate with a bar of its own, which comes if that takes longer than `SLOW` seconds, on a terminal."""
    hidden = not (shown and sys.stderr.isatty())
    return tqdm(things, desc=what, unit="batch", leave=False, delay=SLOW, disable=hidden)
