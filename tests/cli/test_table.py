"""Each command reads the keys of a run's config that its line in the table says: seen while it works on the demo."""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from types import FrameType
from typing import Any, get_type_hints

import pytest

from rawloop.cli import main
from rawloop.cli.doctor import small
from rawloop.cli.table import TABLE
from rawloop.config import RunConfig, known_keys, parse
from rawloop.data.config import NO_MATTER, DataConfig
from rawloop.parser import Reader

# Keys that a command hands on, or tells of, and that change nothing in what it does.
IDLE = {
    "evaluate": {"evaluation.every"},
    "precision probe": {
        *("checkpoint.save_every", "ddp.static_graph", "evaluation.best_metric", "listen.prompts", "listen.samples"),
        *("optim.warmup_ratio", "optim.warmup_steps", "train.log_every", "train.max_steps"),
    },
    "precision compare": {
        *("checkpoint.save_every", "ddp.static_graph", "evaluation.best_metric", "listen.prompts", "listen.samples"),
        *("train.log_every", "train.max_steps"),
    },
}
# Keys that are read in other circumstances than those of the demo: full fine-tuning, FP16, a failure, a GPU; and those
# that say whether an index of samples can be used again, as a whole.
RARE = {
    *("adapter.unfreeze", "data.train"),
    *(key for key in known_keys() if key.startswith(("precision.", "model."))),
    *(f"data.{item.name}" for item in dataclasses.fields(DataConfig) if item.name not in NO_MATTER),
}
CHECKS = ("__post_init__", "_check_fallback", "_check_trainables", "_check_name")  # of values, in the dataclasses


def owners(owner: type = RunConfig, group: str = "") -> Iterator[tuple[Any, str]]:
    """All config dataclasses of a run, with the beginning of their keys."""
    yield owner, group
    hints = get_type_hints(owner)
    for item in dataclasses.fields(owner):
        if dataclasses.is_dataclass(hints[item.name]):
            yield from owners(hints[item.name], f"{group}{item.name}.")


class Reads:
    """The keys of the user's config that are read. A field that `replace` sets is the user's no more."""

    def __init__(self) -> None:
        self.keys: set[str] = set()
        self.mine: dict[int, tuple[Any, set[str]]] = {}  # configs -> the fields that come from the user
        self.carried: dict[int, set[str]] = {}  # calls of `replace` -> the fields that they take over

    @contextmanager
    def watched(self) -> Iterator[set[str]]:
        with pytest.MonkeyPatch.context() as patch:
            for owner, group in owners():
                names = {item.name for item in dataclasses.fields(owner)}
                patch.setattr(owner, "__getattribute__", self.reader(group, names), raising=False)
                patch.setattr(owner, "__init__", self.maker(owner.__init__, names))
            yield self.keys
        self.keys &= known_keys()

    def reader(self, group: str, names: set[str]) -> Callable[[Any, str], Any]:
        def read(config: Any, name: str) -> Any:
            if name in names and name in self.mine.get(id(config), (None, set()))[1]:
                frame = sys._getframe(1)
                if frame.f_code is dataclasses.replace.__code__:
                    self.carried.setdefault(id(frame), set()).add(name)
                elif is_reading(frame):
                    self.keys.add(group + name)
            return object.__getattribute__(config, name)

        return read

    def maker(self, init: Callable[..., None], names: set[str]) -> Callable[..., None]:
        def make(config: Any, *given: Any, **values: Any) -> None:
            frame = sys._getframe(1)
            if frame.f_code is dataclasses.replace.__code__:
                self.mine[id(config)] = config, self.carried.pop(id(frame), set())
            elif frame.f_code is Reader.build.__code__:
                self.mine[id(config)] = config, names
            init(config, *given, **values)

        return make


def is_reading(frame: FrameType) -> bool:
    """Whether a frame reads a key, and does not check its value, or all values together as `asdict` and `==` do."""
    return frame.f_code.co_name not in CHECKS and frame.f_code.co_filename not in (dataclasses.__file__, "<string>")


def slow(*case: Any) -> Any:
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("command", "more"),
    [
        ("prepare", [[]]),
        ("inspect", [[], ["--split", "eval"]]),
        slow("plan", [["--device", "cpu", "--processes", "2"]]),
        ("evaluate", [["--checkpoint", "best"]]),
        ("precision probe", [[]]),
        slow("precision compare", [["--steps", "1"]]),
    ],
)
def test_a_command_reads_the_keys_of_its_line_and_no_others(
    demo_run: Path, command: str, more: list[list[str]]
) -> None:
    row = TABLE[command]
    declared = {key.name for key in row.read_keys()}
    reads = Reads()
    with reads.watched():
        for options in more:
            assert main([*command.split(), str(demo_run / "config.yaml"), *options]) == 0
    assert reads.keys - declared == IDLE.get(command, set())
    assert declared - reads.keys <= RARE


def test_the_doctor_reads_the_keys_that_it_does_not_replace(tmp_path: Path) -> None:
    reads = Reads()
    with reads.watched():
        made = small(parse([], "rawloop doctor").config, tmp_path, 1, 4)
        kept = {
            group + name
            for owner, group in owners()
            for name in reads.mine.get(id(attrgetter(group[:-1])(made) if group else made), (None, set()))[1]
        }
    looked_at = {"output", "checks.enabled"}  # its place on the disk; whether the checks have rows of their own
    without_sinks = {"records.project"}
    assert known_keys() - kept - looked_at == TABLE["doctor"].unread() - without_sinks
