"""`--help` of every command: at once, a screen of what most people set, and `--help all` with everything."""

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from typing import Any, get_type_hints

import pytest

from rawloop.cli import ACTIONS, COMMANDS, OWN_HELP, main
from rawloop.cli.table import TABLE
from rawloop.config import RunConfig, config_keys, known_keys
from rawloop.keys import field_help

Shown = Callable[..., str]
HEAVY = ("torch", "transformers", "numpy", "jsonargparse", "peft", "tqdm")
OF_RUNS = [name for name, row in TABLE.items() if row.reads]


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shown:
    """Give `shown(command, *words)`, which returns the help of a command on a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(command: str, *words: str) -> str:
        capsys.readouterr()
        assert main([*command.split(), *(words or ["--help"])]) == 0
        return capsys.readouterr().out

    return run


def test_every_command_has_a_line_in_the_table() -> None:
    named = [f"{name} {action}" for name in COMMANDS for action in ACTIONS.get(name, ())]
    assert {*TABLE, *OWN_HELP} == {name for name in COMMANDS if name not in ACTIONS} | set(named)


@pytest.mark.parametrize("command", [*TABLE, *ACTIONS, *OWN_HELP])
def test_it_imports_nothing_heavy(command: str) -> None:
    check = (
        f"import sys; from rawloop.cli import main; assert main({[*command.split(), '--help', 'all']}) == 0\n"
        f"loaded = [name for name in {HEAVY} if name in sys.modules]; assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: rawloop {command} ")


@pytest.mark.parametrize("command", [*TABLE, *ACTIONS])
def test_it_fits_a_screen_and_begins_with_what_the_command_does(shown: Shown, command: str) -> None:
    lines = shown(command).splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    text = COMMANDS[command.split()[0]]
    assert f"{text[0].upper()}{text[1:]}." in " ".join(lines)


@pytest.mark.parametrize("command", TABLE)
def test_the_keys_that_most_people_set_are_keys_that_it_reads(shown: Shown, command: str) -> None:
    row, listed = TABLE[command], shown(command)
    keys = {key.name for key in row.read_keys()}
    assert set(row.usual) <= keys
    assert len(set(row.usual)) == len(row.usual)
    assert [key for key in keys if f"--{key} " in listed] == [key for key in keys if key in row.usual]
    assert bool(row.usual) == bool(keys)


@pytest.mark.parametrize("command", TABLE)
def test_all_has_every_key_that_it_reads_and_no_other(shown: Shown, command: str) -> None:
    words, short = shown(command, "--help", "all").split(), shown(command).split()
    keys = {key.name for key in TABLE[command].read_keys()}
    assert {word for word in words if word.startswith("--") and "." in word} == {
        f"--{key}" for key in keys if "." in key
    }
    for key in TABLE[command].own():
        assert (key.name.upper() if key.name == TABLE[command].alone else f"--{key.name}") in words
        assert set(key.text.split()) <= set(words) & set(short)


def test_a_command_lists_no_key_that_it_does_not_read(shown: Shown) -> None:
    for command, unread in (("prepare", "optim.lr"), ("inspect", "checkpoint.save_every"), ("doctor", "train.epochs")):
        assert f"--{unread} " in shown("train", "--help", "all")
        assert f"--{unread} " not in shown(command, "--help", "all")


def test_all_has_every_text(shown: Shown) -> None:
    words = " ".join(shown("train", "--help", "all").split())

    def check(owner: type) -> None:
        hints = get_type_hints(owner)
        summary, texts = field_help(owner)
        assert owner is RunConfig or summary in words
        for item in dataclasses.fields(owner):
            if dataclasses.is_dataclass(hint := hints[item.name]):
                assert isinstance(hint, type)
                check(hint)
            else:
                assert texts[item.name] in words

    check(RunConfig)
    assert all(f" --{key} " in words for key in known_keys())
    assert "--adapter.target_modules '[A, B]' names of" in words
    assert "(default: [q_proj, k_proj, v_proj, o_proj])" in words
    assert "--precision.mode auto|fp32|bf16|amp_fp16|native_fp16 dtype of" in words
    assert "--ddp.find_unused_parameters true|false|auto true: search" in words
    assert "(default: 1e-08)" in words


def test_a_short_text_ends_with_the_default_and_the_choices(shown: Shown) -> None:
    words = " ".join(shown("train").split())
    assert "--precision.mode dtype of computation and weights: auto, fp32, bf16, amp_fp16, native_fp16 [auto]" in words
    assert "--output folder of the run [runs/run]" in words
    assert "--device auto, cuda, mps or cpu [auto]" in words


def test_what_is_rawloops_own_is_not_listed(shown: Shown) -> None:
    assert "--part" not in shown("doctor") + shown("doctor", "--help", "all")
    assert "part" in config_keys(TABLE["doctor"].options)


@pytest.mark.parametrize("words", [("-h",), ("--optim.lr", "1", "--help"), ("--help", "--resume"), ("my.yaml", "-h")])
def test_it_may_stand_anywhere(shown: Shown, words: tuple[str, ...]) -> None:
    assert shown("train", *words) == shown("train")
    assert shown("train", *words, "all") == shown("train", "--help", "all")


def test_options_are_told_from_keys(shown: Shown) -> None:
    assert shown("verify").splitlines()[0] == "usage: rawloop verify RUN [--OPTION VALUE ...]"
    assert shown("report").splitlines()[0] == "usage: rawloop report [RUN] [--OPTION VALUE ...]"
    first = shown("import").splitlines()[0]
    assert first == "usage: rawloop import SOURCE --output TEXT [--OPTION VALUE ...]"
    first = shown("from-trainer").splitlines()[0]
    assert first == "usage: rawloop from-trainer FILE ... --output TEXT [--OPTION VALUE ...]"
    assert "  --compare A B ...  " in shown("report")
    assert "  --copy   " in shown("import")
    assert "usage: rawloop precision probe [FILE.yaml ...]" in shown("precision")


@pytest.mark.parametrize("command", OF_RUNS)
def test_no_option_is_called_like_a_key(command: str) -> None:
    options: Any = TABLE[command].options
    assert not {item.name for item in dataclasses.fields(options)} & known_keys()
