"""What a run has left in its folder, as far as it can be read."""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import yaml

from rawloop.errors import RawloopError, UserError
from rawloop.files import read_text
from rawloop.records import EVENTS, METRICS, read_events, read_metrics
from rawloop.report.plots import span_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

T = TypeVar("T")
CONFIG, CENSUS, BEST = "config.yaml", "census.json", "best.json"


class Series(NamedTuple):
    """One metric over the run: steps and values, (points,) each, in the order in which they were written."""

    steps: "NDArray[Any]"
    values: "NDArray[Any]"


@dataclass
class RunData:
    """What a run has recorded.

    Args:
        folder: the run folder.
        metrics: the lines of metrics.jsonl.
        events: the events of all ranks, by time.
        config: the resolved config; empty if there is none.
        census: the label census; empty if there is none.
        best: the record of the best evaluation; empty if there is none.
        unreadable: a sentence for each file that cannot be read.
    """

    folder: Path
    metrics: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    census: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The name of the run."""
        return self.folder.resolve().name

    @cached_property
    def series(self) -> dict[str, Series]:
        """Every metric that is a number, by name, in the order of first appearance."""
        import numpy as np

        steps: dict[str, list[float]] = defaultdict(list)
        values: dict[str, list[float]] = defaultdict(list)
        for line in self.metrics:
            step = as_float(line["step"])
            for name, value in line.items():
                if (type(value) is float or type(value) is int) and name != "step":
                    steps[name].append(step)
                    values[name].append(value if type(value) is float else as_float(value))
        return {name: Series(np.asarray(steps[name]), np.asarray(values[name])) for name in steps}

    @cached_property
    def last_step(self) -> int:
        """The last step of which there is a metric."""
        return max((int(line["step"]) for line in self.metrics), default=0)

    @cached_property
    def span(self) -> tuple[float, float]:
        """The first and last step of which there is anything: the axis of all figures."""
        lines = [*self.metrics, *self.events]
        return span_of([max(0.0, as_float(line["step"])) for line in lines])

    def of_kind(self, *kinds: str) -> list[dict[str, Any]]:
        """Return the events of some kinds, by time."""
        return [event for event in self.events if event.get("kind") in kinds]

    def settings(self) -> dict[str, Any]:
        """Return the config with dotted keys."""
        return dict(_dotted(self.config))


def _dotted(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def as_float(value: float) -> float:
    """Return a number as a float; a whole number that no float can hold becomes an infinity."""
    try:
        return float(value)
    except OverflowError:
        return math.copysign(math.inf, value)


def read_run(folder: Path) -> RunData:
    """Read what can be read of a run.

    Raises:
        UserError: the folder is no run, or has neither metrics nor events.
    """
    if not folder.is_dir():
        raise UserError(f"'{folder}' is no folder: name a run's folder, the --output of `rawloop train`")
    if not any((folder / name).exists() for name in (METRICS, EVENTS, CONFIG)):
        raise UserError(f"'{folder}' is no run: it has no {METRICS}, no {EVENTS} and no {CONFIG}")
    run = RunData(folder)
    run.metrics = _read(run, lambda: read_metrics(folder), [])
    run.events = _read(run, lambda: read_events(folder), [])
    if not run.metrics and not run.events:
        why = "; ".join(run.unreadable) or f"{METRICS} and {EVENTS} have no complete line yet"
        raise UserError(f"there is nothing to report of '{folder}': {why}")
    run.config = _read_object(run, CONFIG, yaml.safe_load)
    run.census = _read_object(run, CENSUS, json.loads)
    run.best = _read_object(run, BEST, json.loads)
    return run


def _read(run: RunData, read: Callable[[], T], empty: T) -> T:
    """Read a file, or note why it cannot be read."""
    try:
        return read()
    except OSError as error:
        run.unreadable.append(f"{error.filename} cannot be read: {error.strerror}")
    except (KeyError, TypeError) as error:
        run.unreadable.append(f"an event of {run.folder} has no time: {error}")
    except RawloopError as error:
        run.unreadable.append(str(error))
    return empty


def _read_object(run: RunData, name: str, parse: Callable[[str], Any]) -> dict[str, Any]:
    path = run.folder / name
    try:
        found = parse(read_text(path)) if path.exists() else {}
    except OSError as error:
        run.unreadable.append(f"{path} cannot be read: {error.strerror}")
        return {}
    except (ValueError, yaml.YAMLError) as error:
        run.unreadable.append(f"{path} cannot be read: {' '.join(str(error).split())}")
        return {}
    if not isinstance(found, dict):
        run.unreadable.append(f"{path} holds no object")
        return {}
    return found
