"""Python programs in forked processes: the client of `fork_server.py`. Take the fixture `forks`."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SERVER = Path(__file__).with_name("fork_server.py")
Words = Sequence[str | Path]


@dataclass(eq=False)
class Fork:
    """A process: its id, the beginning of its logs' names, its exit code once `Forks.poll` has seen its end."""

    pid: int
    log: str
    code: int | None = None
    stopped: bool = False

    def text(self, kind: str) -> str:
        """What it has written until now, to `out` or `err`. A process that was killed at once has made no file."""
        file = Path(f"{self.log}.{kind}")
        return file.read_text(errors="replace") if file.exists() else ""

    def wait_for(self, text: str, seconds: float = 60.0) -> None:
        """Wait until it has printed a text."""
        deadline = time.monotonic() + seconds
        while text not in self.text("out"):
            assert time.monotonic() < deadline, self.text("err")
            time.sleep(0.01)

    def kill(self) -> None:
        """Kill it, if it has not ended."""
        if self.code is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


class Forks:
    """Starts programs, and waits for them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, 0
        self.process = subprocess.Popen(
            [sys.executable, str(SERVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def _ask(self, **job: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(
        self,
        *arguments: str | Path,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
        finalize: bool = False,
    ) -> Fork:
        """Start what `python ARGUMENTS...` would start; `env` is added to the environment of the tests.

        With `finalize` the interpreter ends as always, which takes a while; else the process just leaves.
        """
        self.started += 1
        log = str(self.folder / str(self.started))
        environment = {**os.environ, **(env or {})}
        words, folder = [str(word) for word in arguments], str(cwd or Path.cwd())
        pid = self._ask(arguments=words, folder=folder, environment=environment, log=log, finalize=finalize)
        return Fork(pid, log)

    def poll(self, forks: Sequence[Fork]) -> list[Fork]:
        """Return those that have not ended."""
        left = [fork for fork in forks if fork.code is None]
        for fork, code in zip(left, self._ask(poll=[fork.pid for fork in left]), strict=True):
            fork.stopped |= code == "stopped"
            fork.code = code if isinstance(code, int) else None
        return [fork for fork in left if fork.code is None]

    def wait(self, forks: Sequence[Fork], seconds: float = 240.0, grace: float | None = None) -> None:
        """Wait until all have ended; kill those that have not. After a first failure the others get `grace` seconds."""
        deadline = time.monotonic() + seconds
        while left := self.poll(forks):
            if grace is not None and any(fork.code for fork in forks):
                deadline, grace = min(deadline, time.monotonic() + grace), None
            if time.monotonic() > deadline or all(fork.stopped for fork in left):
                for fork in left:
                    fork.kill()
            time.sleep(0.01)

    def run(
        self, *arguments: str | Path, timeout: float = 240.0, check: bool = False, **options: Any
    ) -> "subprocess.CompletedProcess[str]":
        """Run a program to its end; `check` and the other options are those of `subprocess.run` and `start`."""
        fork = self.start(*arguments, **options)
        self.wait([fork], timeout)
        assert fork.code is not None
        done = subprocess.CompletedProcess(arguments, fork.code, fork.text("out"), fork.text("err"))
        if check:
            assert done.returncode == 0, done.stderr
        return done

    def close(self) -> None:
        """End the server."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        assert self.process.wait(timeout=240) == 0
        self.process.stdout.close()
