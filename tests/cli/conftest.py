"""What the tests of the commands share: a small run's config, the door called in this process, and forked processes."""

import os
import re
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from rawloop.cli import main
from tests.forks import Forks


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


@pytest.fixture
def ranks(forks: Forks) -> Callable[..., list[Done]]:
    """Give `ranks(*arguments, size=2, seconds=240, then=None, last=())`: a command in forked processes; a result each.

    `then(process ids)` is called after they have started; `last` are further arguments of the last rank.
    """
    code = "import sys; from rawloop.cli import main; sys.exit(main(sys.argv[1:]))"

    def run(
        *arguments: str | Path,
        size: int = 2,
        seconds: float = 240.0,
        then: Callable[[list[int]], None] | None = None,
        last: Sequence[str | Path] = (),
    ) -> list[Done]:
        assert "RANK" not in os.environ
        here = os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])  # for spoilt_family.py
        shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        each = [{"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in range(size)] if size > 1 else [{}]
        more = [()] * (size - 1) + [last]
        started = [
            forks.start("-c", code, *arguments, *word, env={"PYTHONPATH": here, **env})
            for word, env in zip(more, each, strict=True)
        ]
        if then is not None:
            then([fork.pid for fork in started])
        forks.wait(started, seconds)
        return [Done(fork.code or 0, fork.text("out"), fork.text("err")) for fork in started]

    return run
