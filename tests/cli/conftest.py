"""What the tests of the commands share: a small run's config, the door called in this process, and forked processes."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from rawloop.cli import main


@dataclass(frozen=True)
class Done:
    """A command that has ended: its exit code, and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def write_config(demo_checkpoint: Path, demo_data: Path) -> Callable[..., Path]:
    """Give `write_config(folder, group={key: value})`: the file of a run of 3 steps on the demo, into `folder/run`."""

    def write(folder: Path, **groups: dict[str, Any]) -> Path:
        settings: dict[str, Any] = {
            "output": str(folder / "run"),
            "device": "cpu",
            "model": {"path": str(demo_checkpoint / "model")},
            "adapter": {"rank": 4, "alpha": 8.0, "modules_to_save": ["audio_lm_head", "text_lm_head"]},
            "data": {split: str(demo_data / split) for split in ("train", "eval", "codes")},
            "train": {"batch_size": 2, "max_steps": 3, "log_every": 1},
            "optim": {"lr": 3e-3},
            "checks": {"expect_chance": True},
            "evaluation": {"every": 2},
            "checkpoint": {"save_every": 2},
            "records": {"progress": False},
        }
        for group, values in groups.items():
            settings[group] = {**settings.get(group, {}), **values}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        return folder / "run.yaml"

    return write


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory, write_config: Callable[..., Path]) -> Path:
    """The folder of a finished run of 3 steps, with a scene of its own. Read it only."""
    config = write_config(tmp_path_factory.mktemp("demo_run"), data={"default_scene": "A small room."})
    assert main(["train", "--config", str(config)]) == 0
    return config.parent / "run"


@pytest.fixture
def config(tmp_path: Path, write_config: Callable[..., Path]) -> Path:
    """The config of a run of 3 steps on the demo checkpoint, into `tmp_path / "run"`."""
    return write_config(tmp_path)


@pytest.fixture
def door(capfd: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Give `door(*arguments)`, which runs a command in this process."""

    def run(*arguments: str | Path) -> Done:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        return Done(code, *capfd.readouterr())

    return run


@pytest.fixture
def refusal(door: Callable[..., Done]) -> Callable[..., str]:
    """Give `refusal(*arguments, code=2)`: the one line with which a command ends; what it says must be one line."""

    def run(*arguments: str | Path, code: int = 2) -> str:
        return the_line(door(*arguments), code, str(arguments[0]))

    return run


def the_line(done: Done, code: int, command: str) -> str:
    """Return the complaint of a command that failed as it should: one line, the last, no traceback."""
    assert done.code == code, done
    lines = [line for line in re.split(r"[\r\n]+", done.err) if line.strip()]
    found = [line for line in lines if line.startswith(f"rawloop {command}: ")]
    assert found == lines[-1:], done.err
    assert "Traceback" not in done.out + done.err
    return found[0].removeprefix(f"rawloop {command}: ")


def free_port() -> int:
    """A port that nobody has, below those that Linux gives to outgoing connections."""
    while True:
        port = 20000 + int.from_bytes(os.urandom(2)) % 12000
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Server:
    """Speaks with `fork_server.py`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        script = Path(__file__).parent / "fork_server.py"
        self.process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.started = 0

    def ask(self, **job: Any) -> list[int]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer: list[int] = json.loads(self.process.stdout.readline())
        return answer

    def start(self, arguments: list[str], size: int, last: Sequence[str] = ()) -> tuple[list[int], list[str]]:
        """Start a command as `size` ranks; returns their process ids and the beginnings of their logs' names.

        `last` are further arguments of the last rank.
        """
        shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.started += 1
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in range(size)] if size > 1 else [{}]
        logs = [str(self.folder / f"{self.started}-{rank}") for rank in range(size)]
        commands = [arguments] * (size - 1) + [[*arguments, *last]]
        return self.ask(ranks=commands, environment=ranks, logs=logs), logs

    def finish(self, children: list[int], logs: list[str], seconds: float) -> list[Done]:
        codes = self.ask(wait=children, seconds=seconds)
        files = [[Path(f"{log}.{kind}") for kind in ("out", "err")] for log in logs]
        # A process that was killed at once has not made its files.
        texts = [[file.read_text(errors="replace") if file.exists() else "" for file in pair] for pair in files]
        return [Done(code, *text) for code, text in zip(codes, texts, strict=True)]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The process that commands are forked from."""
    server = Server(tmp_path_factory.mktemp("forks"))
    yield server
    assert server.process.stdin is not None
    server.process.stdin.close()
    assert server.process.wait(timeout=240) == 0
    assert server.process.stdout is not None
    server.process.stdout.close()


@pytest.fixture
def ranks(server: Server) -> Callable[..., list[Done]]:
    """Give `ranks(*arguments, size=2, seconds=240, then=None, last=())`: a command in forked processes; a result each.

    `then(process ids)` is called after they have started; `last` are further arguments of the last rank.
    """

    def run(
        *arguments: str | Path,
        size: int = 2,
        seconds: float = 240.0,
        then: Callable[[list[int]], None] | None = None,
        last: Sequence[str | Path] = (),
    ) -> list[Done]:
        assert "RANK" not in os.environ
        children, logs = server.start([str(argument) for argument in arguments], size, [str(word) for word in last])
        if then is not None:
            then(children)
        return server.finish(children, logs, seconds)

    return run
