"""The files that a run writes for people: metrics, events and lines of progress.

`metrics.jsonl` and `events.jsonl` are the truth; sinks such as TensorBoard receive copies. Each line is passed to the
operating system before the call returns. A resumed run cuts off, and reports, a line that a crash left incomplete.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self, get_args

from tqdm import tqdm

from rawloop.dist import World
from rawloop.errors import RawloopError
from rawloop.files import replace_file
from rawloop.progress import Progress
from rawloop.settings import RecordsConfig as RecordsConfig
from rawloop.sinks import Sinks, Value, check_packages

EventKind = Literal[
    "start",
    "stop",
    "precision",
    "check",
    "skip",
    "fallback",
    "save",
    "restore",
    "best",
    "bad_sample",
    "warning",
    "finding",
    "capsule",
]
Log = Callable[[str], object] | None
METRICS, EVENTS, DISCARDED = "metrics.jsonl", "events.jsonl", "metrics.discarded.jsonl"
MEND = "rawloop writes no such line: mend it, or move the file aside"
NOT_FINITE = ("nan", "inf", "-inf")
# Metrics that no two runs have in common, nor a resumed run and one that was not stopped.
SPEEDS = ("samples_per_second", "tokens_per_second", "audio_seconds_per_second", "step_seconds")
TIMES = ("eval_seconds", *SPEEDS, "data_wait", "padding", "mfu", "peak_memory_gb")


def json_value(value: Any) -> Any:
    """Return the value as JSON can hold it: a float that is not finite becomes its name, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(float(value))
    if isinstance(value, Mapping):
        return {name: json_value(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    return value


def _to_line(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, allow_nan=False).encode() + b"\n"


def _cut_torn_tail(path: Path) -> str | None:
    """Cut off an incomplete last line and return it."""
    if not path.exists():
        return None
    with path.open("r+b") as file:  # unlike "rb", this does not wait where the path is a pipe: it raises
        data = file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            file.truncate(whole)
    return data[whole:].decode(errors="replace") or None


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file, except an incomplete last line: the writer may still be writing, or have died."""
    *whole, _ = path.read_bytes().split(b"\n") if path.exists() else [b""]
    for number, line in enumerate(whole, start=1):
        try:
            found = json.loads(line)
        except ValueError as error:
            raise RawloopError(f"{path} line {number} is not JSON: {error}; {MEND}") from error
        if not isinstance(found, dict) or not isinstance(found.get("step"), int):
            raise RawloopError(f"{path} line {number} is no object with a whole number 'step': {line[:80]!r}; {MEND}")
        yield found


def read_metrics(folder: Path) -> list[dict[str, Value]]:
    """Return the lines of a run's `metrics.jsonl`, in order; "nan", "inf" and "-inf" become floats."""
    return [
        {name: float(value) if type(value) is str and value in NOT_FINITE else value for name, value in line.items()}
        for line in _read_lines(folder / METRICS)
    ]


def read_events(folder: Path) -> list[dict[str, Any]]:
    """Return the events of all ranks of a run, sorted by time."""
    paths = [folder / EVENTS, *sorted(folder.glob("events-rank*.jsonl"))]
    return sorted((event for path in paths for event in _read_lines(path)), key=lambda event: event["time"])


def to_stderr(line: str) -> None:
    """Print a line above the progress bar, if there is one."""
    tqdm.write(line, file=sys.stderr)


class Records:
    """Metrics, events and progress of one run. Every rank has one; only rank 0 writes metrics and shows progress.

    Each rank writes its events to its own file: rank 0 to `events.jsonl`, rank 1 to `events-rank00001.jsonl`. All ranks
    construct it, and all call `rewind`.

    Args:
        folder: the run folder; created if it is missing.
        world: the ranks.
        config: sinks and progress.
        log: called with each event of rank 0 and each line of progress, for example `logging.getLogger("run").info`;
            None prints nothing. The files are written in any case.
        settings: the settings of the run, nested dicts of JSON values, which sinks show.

    `is_complete` is to be set when the run has reached its end, so that sinks do not show it as broken off.

    Raises:
        UserError: a sink needs a package that is not installed.
        RawloopError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        world: World,
        config: RecordsConfig | None = None,
        *,
        log: Log = to_stderr,
        settings: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.folder, self.world, self.config = Path(folder), world, config or RecordsConfig()
        self.settings, self.is_complete = dict(settings), False
        self._log = log if world.is_main else None
        self._files: dict[str, FileIO] = {}
        self._sinks: Sinks | None = None
        self._progress: Progress | None = None
        self._purge_step: int | None = None
        world.on_all_ranks(self._start, only_main=True)

    def _start(self) -> None:
        check_packages(self.config)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._open(METRICS)

    def _open(self, name: str) -> FileIO:
        if name in self._files:
            return self._files[name]
        path = self.folder / name
        try:
            torn = _cut_torn_tail(path)
            self._files[name] = path.open("ab", buffering=0)
        except OSError as error:
            raise RawloopError(f"cannot write {path}: {error.strerror or error}") from error
        if torn is not None:
            self.event("warning", step=-1, reason=f"cut a torn last line off {name}: {torn!r}")
        return self._files[name]

    def _append(self, name: str, values: Mapping[str, Any]) -> None:
        """Write one object as one line, completely or not at all."""
        file, rest = self._open(name), _to_line(values)
        end = os.fstat(file.fileno()).st_size
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError as error:
            file.truncate(end)
            raise RawloopError(f"cannot write {self.folder / name}: {error.strerror}") from error

    def metrics(self, step: int, values: Mapping[str, Value]) -> None:
        """Write one line of metrics for `step`, on rank 0. A nan or an infinity is written by its name.

        Raises:
            TypeError: a value is no Python number or string: reading a tensor here would hide a device sync.
        """
        for name, value in values.items():
            if not isinstance(value, float | int | str) and value is not None:
                raise TypeError(f"metric {name!r} is a {type(value).__name__}: pass a Python number or a string")
        if not self.world.is_main:
            return
        self._append(METRICS, {"step": step, **json_value(values)})
        if self._progress is not None:
            self._progress.show(step, values)
        self._open_sinks().write(step, values)
        self._report(step)

    def sounds(self, step: int, wavs: Mapping[str, Path]) -> None:
        """Send clips, wav files by name, to the sinks, on rank 0."""
        if self.world.is_main and wavs:
            self._open_sinks().sounds(step, wavs)

    def _open_sinks(self) -> Sinks:
        self._sinks = self._sinks or Sinks(self.folder, self.config, self.settings, self._purge_step)
        return self._sinks

    def _report(self, step: int, ending: bool = False) -> None:
        """Record what sinks could not do. Training goes on."""
        if self._sinks is None:
            return
        for problem in self._sinks.close(self.is_complete) if ending else self._sinks.problems():
            self.event("warning", step=step, reason=f"{problem} ({METRICS} has every line)")

    def event(self, kind: EventKind, *, step: int, reason: str, show: bool = True, **fields: Any) -> None:
        """Record a decision or an incident, on any rank; rank 0 logs it too, if it is to `show`.

        `step` is -1 for an event outside the steps. `fields` are further JSON values.
        """
        if kind not in get_args(EventKind):
            raise ValueError(f"{kind!r} is no kind of event; these are: {', '.join(get_args(EventKind))}")
        rank = self.world.rank
        name = f"events-rank{rank:05d}.jsonl" if rank else EVENTS
        self._open(name)  # before the time is read: opening may write an event
        line = {"time": time.time(), "kind": kind, "step": step, "rank": rank, "reason": reason}
        self._append(name, {**line, **json_value(fields)})
        if self._log and show:
            self._log(f"[{kind}] step {step}: {reason}" if step >= 0 else f"[{kind}] {reason}")

    def rewind(self, step: int, evaluated: bool = True, entered: Sequence[str] = ()) -> None:
        """Move metrics after `step` to `metrics.discarded.jsonl`: the resumed run writes them again. Events stay.

        Args:
            step: where the run resumes.
            evaluated: whether the evaluation of `step` itself stays; if not, it will be repeated.
            entered: the precision modes that the run had fallen back to at `step`.
        """
        self.world.on_all_ranks(lambda: self._rewind(step, evaluated, entered), only_main=True)

    def _rewind(self, step: int, evaluated: bool, entered: Sequence[str]) -> None:
        def stays(line: dict[str, Any]) -> bool:
            if line["step"] != step:
                return bool(line["step"] < step)
            repeated = "fallback" in line and line["precision"] not in entered
            return not repeated and (evaluated or "eval_loss" not in line)

        self._purge_step = step + 1
        if self._sinks is not None:
            self._sinks.rewind(self._purge_step)
        lines = list(_read_lines(self.folder / METRICS))
        later = [line for line in lines if not stays(line)]
        if not later:
            return
        for line in later:
            self._append(DISCARDED, line)
        self._files.pop(METRICS).close()
        replace_file(self.folder / METRICS, b"".join(_to_line(line) for line in lines if stays(line)))
        where = f"later than step {step}" if evaluated else f"from the evaluation of step {step} on"
        where = where if step >= 0 else "of a start that came to no checkpoint"
        self.event("restore", step=step, reason=f"moved {len(later)} line(s) of metrics {where} to {DISCARDED}")

    def progress(self, total: int | None, initial: int = 0, evaluate_every: int | None = None) -> Progress:
        """Return the progress over optimizer steps, to which `metrics` gives what it writes. Other ranks show none."""
        shown = self.world.is_main and self.config.progress
        self._progress = Progress(
            total,
            initial,
            log=self._log if shown else None,
            bar=shown and sys.stderr.isatty(),
            evaluate_every=evaluate_every,
        )
        return self._progress

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.is_complete = self.is_complete or kind is None
        self.close()

    def close(self) -> None:
        """Close the files and the sinks; nothing can be written afterwards."""
        if self._progress is not None:
            self._progress.close()
        try:
            self._report(step=-1, ending=True)
        finally:
            self._sinks = None
            for file in self._files.values():
                file.close()
