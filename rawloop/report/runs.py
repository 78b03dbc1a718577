"""What a run has left in its folder, as far as it can be read."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import yaml
from numpy.typing import NDArray

from rawloop.errors import RawloopError, UserError
from rawloop.files import in_words, read_text
from rawloop.records import EVENTS, METRICS, read_events, read_metrics
from rawloop.report.plots import Span, span_of

T = TypeVar("T")
CONFIG, CENSUS, BEST = "config.yaml", "census.json", "best.json"


class Series(NamedTuple):
    """One metric over the run: steps and values, (points,) each, in the order in which they were written."""

    steps: NDArray[Any]
    values: NDArray[Any]


@dataclass
class RunData:
    """What a run has recorded. What there is not is empty."""

    folder: Path
    series: dict[str, Series] = field(default_factory=dict)  # every metric that is a number, by first appearance
    events: list[dict[str, Any]] = field(default_factory=list)  # of all ranks, by time
    config: dict[str, Any] = field(default_factory=dict)  # resolved
    census: dict[str, Any] = field(default_factory=dict)  # of the labels
    best: dict[str, Any] = field(default_factory=dict)  # the record of the best evaluation
    last_step: int = 0  # of which there is anything
    unreadable: list[str] = field(default_factory=list)  # a sentence for each file that cannot be read

    @property
    def name(self) -> str:
        """The name of the run."""
        return self.folder.resolve().name

    @property
    def span(self) -> Span:
        """The axis of all figures, from step 0 on."""
        return span_of([0, self.last_step])

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
    lines: list[dict[str, Any]] = _read(run, METRICS, lambda path: read_metrics(path.parent), [])
    run.events = _read(run, EVENTS, lambda path: read_events(path.parent), [])
    if not lines and not run.events:
        why = "; ".join(run.unreadable) or f"{METRICS} and {EVENTS} have no complete line yet"
        raise UserError(f"there is nothing to report of '{folder}': {why}")
    run.last_step = max(0, *(line["step"] for line in chain(lines, run.events)))
    run.series = _read(run, METRICS, lambda _: _series(lines), {})
    run.config = _read(run, CONFIG, lambda path: _object(path, yaml.safe_load), {})
    run.census = _read(run, CENSUS, lambda path: _object(path, json.loads), {})
    run.best = _read(run, BEST, lambda path: _object(path, json.loads), {})
    return run


def _series(lines: list[dict[str, Any]]) -> dict[str, Series]:
    """Return the columns of the metrics. A pass per metric, in place of this one pass, takes three times as long."""
    steps: dict[str, list[float]] = defaultdict(list)
    values: dict[str, list[float]] = defaultdict(list)
    for line in lines:
        step = line["step"]
        for name, value in line.items():
            if type(value) is float or type(value) is int:
                steps[name].append(step)
                values[name].append(value)
    return {
        name: Series(np.array(steps[name], float), np.array(values[name], float)) for name in steps if name != "step"
    }


def _read(run: RunData, name: str, read: Callable[[Path], T], empty: T) -> T:
    """Read a file, or note why it cannot be read."""
    path = run.folder / name
    try:
        return read(path)
    except RawloopError as error:
        why = str(error)
    except (KeyError, TypeError) as error:
        why = f"{path} cannot be read: a line has no time ({error!r})"
    except (OSError, ValueError, OverflowError, yaml.YAMLError) as error:
        why = f"{path} cannot be read: {' '.join(in_words(error).split())}"
    run.unreadable.append(why)
    return empty


def _object(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    found = parse(read_text(path)) if path.exists() else {}
    if not isinstance(found, dict):
        raise ValueError("it holds no object")
    return found
