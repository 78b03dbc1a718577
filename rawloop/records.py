"""What a run leaves behind to be read: numbers in `metrics.jsonl`, decisions in `events.jsonl`, and its progress.

The two files are the truth; TensorBoard and W&B only receive copies. A line is on its way to the disk before the call
returns, and a line torn by a crash is cut off, with a word about it, when the run goes on.
"""

import json
import math
import os
import secrets
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Self, get_args

from tqdm import tqdm

from rawloop.dist import World
from rawloop.errors import RawloopError, UserError

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
]
Value = float | int | str | None

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
DISCARDED = "metrics.discarded.jsonl"
MEND = "rawloop writes no such line: mend it, or move the file aside"
NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
# What a line of progress shows of the metrics, and how. Only lines with one of the two losses are shown.
LOSSES = ("loss", "eval_loss")
SHOWN = {
    "loss": "loss {:.4f}",
    "eval_loss": "eval_loss {:.4f}",
    "grad_norm": "grad_norm {:.3g}",
    "lr": "lr {:.3g}",
    "samples_per_second": "{:.1f} samples/s",
}


@dataclass
class RecordsConfig:
    """Where metrics go besides `metrics.jsonl`, which is always written.

    Args:
        tensorboard: also write TensorBoard files into the run folder (needs the package tensorboard).
        wandb: also send metrics to Weights & Biases (needs the package wandb).
        wandb_project: project that the run appears in there.
        progress: show a progress bar on rank 0; where stderr is no terminal, a line per log step and per evaluation.
    """

    tensorboard: bool = False
    wandb: bool = False
    wandb_project: str = "rawloop"
    progress: bool = True


def check_packages(config: RecordsConfig) -> None:
    """Refuse a config that asks for records by a package that is not installed.

    Raises:
        UserError: it does.
    """
    for package, wanted in (("tensorboard", config.tensorboard), ("wandb", config.wandb)):
        if wanted and find_spec(package) is None:
            raise UserError(
                f"records.{package} is true, but the package {package} is not installed: "
                f"run `pip install {package}`, or set records.{package} to false"
            )


class Lines:
    """A file of JSON objects, one a line, that is only appended to."""

    def __init__(self, path: Path) -> None:
        """Open or make the file. `torn` is the part line that a crash left at its end, now cut off, or None."""
        self.path = path
        try:
            self.torn = _cut_torn_tail(path)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise RawloopError(f"cannot write {path}: {error.strerror or error}") from error

    def append(self, values: Mapping[str, Any]) -> None:
        """Write one object as one line, whole or not at all.

        Raises:
            RawloopError: the disk takes no more.
        """
        data = json.dumps(values, allow_nan=False).encode() + b"\n"
        end = os.fstat(self._file.fileno()).st_size
        try:
            rest = data
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._file.truncate(end)
            raise RawloopError(f"cannot write {self.path}: {error.strerror}") from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _cut_torn_tail(path: Path) -> str | None:
    """Cut off what stands behind the last line end, if anything, and return it."""
    if not path.exists():
        return None
    with path.open("r+b") as file:
        data = file.read()
        whole = data.rfind(b"\n") + 1
        if whole == len(data):
            return None
        file.truncate(whole)
    return data[whole:].decode(errors="replace")


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file, but for a torn last line, which a running or dead writer may have left."""
    if not path.exists():
        return
    *whole, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(whole, start=1):
        try:
            found = json.loads(line)
        except ValueError as error:
            raise RawloopError(f"{path} line {number} is not JSON: {error}; {MEND}") from error
        if not isinstance(found, dict) or not isinstance(found.get("step"), int):
            raise RawloopError(f"{path} line {number} is no object with a whole number 'step': {line[:80]!r}; {MEND}")
        yield found


def read_metrics(folder: Path) -> list[dict[str, Value]]:
    """Return the lines of a run's `metrics.jsonl`, in order, with "nan", "inf" and "-inf" as floats again."""
    return [
        {name: NOT_FINITE.get(value, value) if isinstance(value, str) else value for name, value in line.items()}
        for line in _read_lines(folder / METRICS)
    ]


def read_events(folder: Path) -> list[dict[str, Any]]:
    """Return the events of all ranks of a run, in order of time."""
    paths = [folder / EVENTS, *sorted(folder.glob("events-rank*.jsonl"))]
    return sorted((event for path in paths for event in _read_lines(path)), key=lambda event: event["time"])


def honest(value: Any) -> Any:
    """Return a value that JSON can hold: a float that is not finite becomes its name, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(float(value))
    if isinstance(value, Mapping):
        return {name: honest(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [honest(item) for item in value]
    return value


def progress_line(step: int, total: int | None, values: Mapping[str, Value]) -> str:
    """Return what a log file shows of a line of metrics: `step 120/60000  loss 4.3520  lr 1.2e-05`."""
    shown = [text.format(values[name]) for name, text in SHOWN.items() if isinstance(values.get(name), float | int)]
    return "  ".join([f"step {step}" if total is None else f"step {step}/{total}", *shown])


class Records:
    """Metrics, events and progress of one run. Every rank has one; only rank 0 writes metrics and shows progress.

    Each rank writes events to a file of its own, so that lines never mix: rank 0 to `events.jsonl`, rank 1 to
    `events-rank00001.jsonl`. Constructing it and `rewind` must happen on every rank.

    Raises:
        UserError: a sink is asked for whose package is not installed.
        RawloopError: the folder cannot be written.
    """

    def __init__(self, folder: str | Path, world: World, config: RecordsConfig) -> None:
        self.folder = Path(folder)
        self.world = world
        self.config = config
        self._metrics: Lines | None = None
        self._events: Lines | None = None
        self._sinks: list[TensorBoard | WeightsAndBiases] | None = None
        self._bar: tqdm[Any] | None = None
        self._total: int | None = None
        self._lines_shown = False  # for a log file, in which a bar would be one long line of itself
        self._purge_step: int | None = None
        world.on_all_ranks(self._open, only_main=True)

    def _open(self) -> None:
        check_packages(self.config)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._metrics = self._lines(METRICS)

    def _lines(self, name: str) -> Lines:
        lines = Lines(self.folder / name)
        if lines.torn is not None:
            if name.startswith("events"):
                self._events = lines
            self.event("warning", step=-1, reason=f"cut a torn last line off {name}: {lines.torn!r}")
        return lines

    def metrics(self, step: int, values: Mapping[str, Value]) -> None:
        """Write one line of metrics for `step`, on rank 0. A nan or an infinity is written as it is, by its name.

        Raises:
            TypeError: a value is no Python number or string (a tensor here would hide a wait for the device).
        """
        for name, value in values.items():
            if not isinstance(value, float | int | str) and value is not None:
                raise TypeError(f"metric {name!r} is a {type(value).__name__}: pass a Python number or a string")
        if self._metrics is None:
            return
        self._metrics.append({"step": step, **honest(values)})
        if self._lines_shown and any(name in values for name in LOSSES):
            print(progress_line(step, self._total, values), file=sys.stderr, flush=True)
        if self._sinks is None:
            self._sinks = list(self._open_sinks())
        for sink in self._sinks:
            sink.write(step, values)

    def _open_sinks(self) -> "Iterator[TensorBoard | WeightsAndBiases]":
        if self.config.tensorboard:
            yield TensorBoard(self.folder / "tensorboard", self._purge_step)
        if self.config.wandb:
            yield WeightsAndBiases(self.folder, self.config.wandb_project)

    def event(self, kind: EventKind, *, step: int, reason: str, **fields: Any) -> None:
        """Write down on any rank that something was decided or happened, and say so on rank 0's console.

        `step` is -1 for what belongs to no step. `fields` are further JSON values.
        """
        if kind not in get_args(EventKind):
            raise ValueError(f"{kind!r} is no kind of event; these are: {', '.join(get_args(EventKind))}")
        if self._events is None:
            self._events = self._lines(
                EVENTS if self.world.is_main else f"events-rank{self.world.rank:05d}.jsonl",
            )
        line = {"time": time.time(), "kind": kind, "step": step, "rank": self.world.rank, "reason": reason}
        self._events.append({**line, **honest(fields)})
        if self.world.is_main:
            tqdm.write(f"[{kind}] step {step}: {reason}" if step >= 0 else f"[{kind}] {reason}", file=sys.stderr)

    def rewind(self, step: int, evaluated: bool = True, entered: Sequence[str] = ()) -> None:
        """Take metrics later than `step` out of `metrics.jsonl`: a continuation from there will write its own.

        They are moved to `metrics.discarded.jsonl`. Events stay: they did happen. `evaluated` says that the evaluation
        of `step` itself is not repeated; `entered` names the precision modes that were fallen back to until then.
        """
        self.world.on_all_ranks(lambda: self._rewind(step, evaluated, entered), only_main=True)

    def _rewind(self, step: int, evaluated: bool, entered: Sequence[str]) -> None:
        def stays(line: dict[str, Any]) -> bool:
            if line["step"] != step:
                return bool(line["step"] < step)
            to_come = "fallback" in line and line["precision"] not in entered
            return not to_come and (evaluated or "eval_loss" not in line)

        assert self._metrics is not None
        self._close_sinks()
        self._purge_step = step + 1
        lines = list(_read_lines(self.folder / METRICS))
        later = [line for line in lines if not stays(line)]
        if not later:
            return
        discarded = self._lines(DISCARDED)
        for line in later:
            discarded.append(line)
        discarded.close()
        self._metrics.close()
        _replace_lines(self.folder / METRICS, [line for line in lines if stays(line)])
        self._metrics = self._lines(METRICS)
        where = f"later than step {step}" if evaluated else f"from the evaluation of step {step} on"
        if step < 0:
            where = "of a start that came to no checkpoint"
        reason = f"moved {len(later)} line(s) of metrics {where} to {DISCARDED}"
        self.event("restore", step=step, reason=reason)

    def progress(self, total: int | None, initial: int = 0) -> "tqdm[Any]":
        """Return a progress bar over optimizer steps: `update(n)`, `set_postfix(...)`, `close()`.

        It does nothing on other ranks, nor where stderr is no terminal: there `metrics` says a line of its own.
        """
        shown, terminal = self.world.is_main and self.config.progress, sys.stderr.isatty()
        self._total, self._lines_shown = total, shown and not terminal
        self._bar = tqdm(total=total, initial=initial, disable=not (shown and terminal), mininterval=0.5, unit="step")
        return self._bar

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close files and sinks; nothing can be written afterwards."""
        if self._bar is not None:
            self._bar.close()
        self._close_sinks()
        for lines in (self._metrics, self._events):
            if lines is not None:
                lines.close()

    def _close_sinks(self) -> None:
        for sink in self._sinks or ():
            sink.close()
        self._sinks = None


def _replace_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """Rewrite a file of JSON lines so that a reader, or a crash, finds the old one or the other one."""
    temporary = path.with_name(f".tmp-{path.name}")
    with temporary.open("wb") as file:
        file.writelines(json.dumps(line, allow_nan=False).encode() + b"\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


class TensorBoard:
    """Copies numbers into TensorBoard event files."""

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # optional, and slow to import

        self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        """Write every number; strings and None have no place on a curve."""
        for name, value in values.items():
            if isinstance(value, float | int):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush, and end the writer's thread."""
        self._writer.close()


class WeightsAndBiases:
    """Copies metrics to Weights & Biases, into the same run there when a run is resumed."""

    def __init__(self, folder: Path, project: str) -> None:
        wandb = import_module("wandb")

        path = folder / "wandb-id"
        if not path.exists():
            path.write_text(secrets.token_hex(8))
        identity = path.read_text().strip()
        self._run = wandb.init(project=project, name=folder.name, id=identity, dir=str(folder), resume="allow")
        # W&B drops what is logged for an earlier step than its own counter, as after a rewind; ours is a metric
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        """Send the values of one step."""
        self._run.log({"step": step, **values})

    def close(self) -> None:
        """Finish the run there."""
        self._run.finish()
