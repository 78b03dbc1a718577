"""Copies of a run's metrics for TensorBoard, Weights & Biases, MLflow and trackio. Each sink is a process of its own.

So no library can slow the training, end it, or keep it from ending. The training writes lines to a pipe and never waits
for it. What a sink cannot do comes back as a problem in words; `metrics.jsonl` has every line in any case.
"""

import json
import os
import select
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rawloop.errors import UserError
from rawloop.settings import RecordsConfig

Value = float | int | str | None
LIMIT = 30.0  # seconds in which sinks write what is left at the end of a run, and answer before its start
MOST = 100_000  # lines that wait for a sink
RESTARTS = 3  # of a sink's process that has ended by itself


def check_packages(config: RecordsConfig) -> None:
    """Raise UserError if the config asks for a package that is not installed."""
    for package in config.report_to:
        found = find_spec(package)
        if found is None or found.origin is None:  # a folder of that name, such as W&B's own, is no package
            raise UserError(
                f"records.report_to has {package}, but the package {package} is not installed: run "
                f"`pip install 'rawloop[{package}]'`, or take it out"
            )


def check_sinks(config: RecordsConfig) -> None:
    """Raise UserError if a sink is not installed or not set up: no key, a store that cannot be used.

    A server that does not answer is no mistake of the config: that is told while the run goes on.
    """
    check_packages(config)
    asked = [_Process(name, {"check": config.project}) for name in config.report_to]
    deadline = time.monotonic() + LIMIT
    for process in asked:
        process.end()
    found = [(process.name, problem) for process in asked for problem in process.finish(deadline)]
    for name, problem in found:
        if not problem.startswith(LATE):
            raise UserError(f"records.report_to has {name}, which is not set up: {problem}; set it up, or take it out")


class Sinks:
    """The sinks of a run.

    Args:
        folder: the run folder, whose name is the name of the run. A sink's id of the run is kept there.
        config: which sinks.
        settings: the settings of the run, nested dicts of JSON values, which each sink shows.
        purge_step: TensorBoard hides what earlier processes have written from this step on.
    """

    def __init__(
        self, folder: Path, config: RecordsConfig, settings: Mapping[str, Any], purge_step: int | None
    ) -> None:
        opening = {"folder": str(folder), "project": config.project, "settings": settings, "purge_step": purge_step}
        self._processes = [_Process(name, opening) for name in config.report_to]

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        """Write the metrics of one step."""
        self._send({"step": step, "values": values})

    def sounds(self, step: int, wavs: Mapping[str, Path]) -> None:
        """Write clips of one step: wav files by name."""
        self._send({"step": step, "sounds": {name: str(path) for name, path in wavs.items()}})

    def rewind(self, purge_step: int) -> None:
        """See that steps from this one on will be written again."""
        self._send({"purge_step": purge_step})

    def _send(self, line: Mapping[str, Any]) -> None:
        for process in self._processes:
            process.send(line)

    def problems(self) -> Iterator[str]:
        """Yield what went wrong since the last call."""
        for process in self._processes:
            yield from (f"{process.name} {problem}" for problem in process.problems())

    def close(self, complete: bool) -> Iterator[str]:
        """End the sinks, and yield what went wrong. `complete`: the run has reached its last step."""
        deadline = time.monotonic() + LIMIT
        for process in self._processes:
            process.end({"complete": complete})
        for process in self._processes:
            yield from (f"{process.name} {problem}" for problem in process.finish(deadline))


LATE = "did not end within"


class _Process:
    """The process of one sink, and the lines that wait for it."""

    def __init__(self, name: str, opening: Mapping[str, Any]) -> None:
        self.name, self._opening = name, opening
        self._waiting: deque[bytes] = deque()
        self._written = 0  # bytes of the first line that waits
        self._problems: list[str] = []
        self._answers = b""
        self._restarts = self._left_out = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._start()

    def _start(self) -> None:
        path = [str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(  # noqa: S603  # this package's own module
            [sys.executable, "-m", "rawloop.sink_process", self.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
            start_new_session=True,  # Ctrl-C is for the training
        )
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
        self._waiting.appendleft(_to_line(self._opening))
        self._written = 0

    def send(self, line: Mapping[str, Any]) -> None:
        """Send a line, or leave it waiting."""
        if self._process is None:
            return
        if len(self._waiting) < MOST:
            self._waiting.append(_to_line(line))
        else:
            self._left_out += 1
        self._push()

    def _push(self) -> None:
        """Write what the pipe takes now."""
        try:
            while self._process and self._process.stdin and self._waiting:
                self._written += os.write(self._process.stdin.fileno(), self._waiting[0][self._written :])
                if self._written == len(self._waiting[0]):
                    self._waiting.popleft()
                    self._written = 0
        except BlockingIOError:  # the pipe is full
            return
        except BrokenPipeError:
            self._restart()

    def _restart(self) -> None:
        """Start the process again, unless it has ended too often."""
        self._read()
        assert self._process is not None
        code = self._process.wait()
        self._close_pipes()
        again = self._restarts < RESTARTS
        self._restarts += 1
        ending = "was started again and may lack some lines" if again else "gets nothing more in this run"
        self._problems.append(f"has ended by itself (exit code {code}); it {ending}")
        if again:
            self._opening = {**self._opening, "purge_step": None}  # or what is written already would be hidden
            self._start()
        else:
            self._process = None

    def _close_pipes(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout) if self._process else ():
            if pipe:
                pipe.close()

    def _read(self) -> bool:
        """Read problems; return whether more may follow."""
        assert self._process is not None
        assert self._process.stdout is not None
        try:
            while data := os.read(self._process.stdout.fileno(), 65536):
                *lines, self._answers = (self._answers + data).split(b"\n")
                self._problems += [json.loads(line)["problem"] for line in lines]
        except BlockingIOError:
            return True
        return False

    def problems(self) -> list[str]:
        """Return what went wrong since the last call."""
        if self._process is not None:
            self._read()
            if self._process.poll() is not None:
                self._restart()
        if self._left_out:
            self._problems.append(f"lacks {self._left_out} line(s): more than {MOST:,} were waiting")
            self._left_out = 0
        found, self._problems = self._problems, []
        return found

    def end(self, line: Mapping[str, Any] | None = None) -> None:
        """Send the last line, if there is one."""
        if line is None:
            self._push()
        else:
            self.send(line)
        self._end_input()

    def _end_input(self) -> None:
        if not self._waiting and self._process and self._process.stdin:
            self._process.stdin.close()

    def finish(self, deadline: float) -> list[str]:
        """Wait until the process has ended; kill it at the deadline. Return what went wrong."""
        while self._process is not None:
            if not self._read():
                code = self._process.wait()
                self._close_pipes()
                if code or self._waiting:
                    self._problems.append(f"has ended by itself (exit code {code}) and may lack the last lines")
                self._process = None
            elif time.monotonic() >= deadline:
                self._process.kill()
                self._process.wait()
                self._close_pipes()
                self._problems.append(f"{LATE} {LIMIT:g} s and was killed: it may lack the last lines")
                self._process = None
            else:
                self._await(min(deadline - time.monotonic(), 1.0))
                self._push()
                self._end_input()
        return self.problems()

    def _await(self, seconds: float) -> None:
        """Wait until the process takes or gives something."""
        assert self._process is not None
        assert self._process.stdout is not None
        waiting = select.poll()
        waiting.register(self._process.stdout, select.POLLIN)
        if self._waiting and self._process.stdin:
            waiting.register(self._process.stdin, select.POLLOUT)
        waiting.poll(max(0.0, seconds) * 1000)


def _to_line(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values).encode() + b"\n"
