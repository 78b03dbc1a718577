"""`rawloop plan`: the tables, the batches that they are for, and the changes that make a run fit."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rawloop.adapters.config import AdapterConfig
from rawloop.cards import CARDS, Choice, changes_that_fit, room
from rawloop.cli import COMMANDS
from rawloop.config import RunConfig
from rawloop.sizing import other_choices, with_choice
from tests.cli.conftest import Done

Door = Callable[..., Done]


@pytest.fixture
def large(text_checkpoint: Path, tmp_path: Path) -> Path:
    """A Llama with 2.8 billion parameters, without weights."""
    folder = tmp_path / "large"
    shutil.copytree(text_checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = json.loads((folder / "config.json").read_text())
    sizes = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "head_dim": 128}
    sizes |= {"num_attention_heads": 24, "num_key_value_heads": 8, "max_position_embeddings": 4096}
    (folder / "config.json").write_text(json.dumps(settings | sizes | {"dtype": "bfloat16"}))
    return folder


@pytest.mark.slow
def test_a_large_model_without_weights_and_data(door: Door, large: Path) -> None:
    options = ["--model.path", large, "--positions", "1000", "--samples", "4", "--precision.mode", "bf16"]
    done = door("plan", *options)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert len(lines) <= 40
    assert re.match(r".*: 2,8\d\d,\d{3},\d{3} parameters, 9,175,040 trained \(lora, bf16, activation", lines[0])
    rows = {tuple(line.split()[:2]): line.split() for line in lines if line.startswith(("lora", "full"))}
    assert len(rows) == 8
    own = rows["lora", "bf16"]
    assert own[2] == "*"
    frozen, total, on, off = (float(own[place]) for place in (3, -3, -2, -1))
    assert frozen == pytest.approx(5.64, abs=0.02)
    assert on < total == off
    (small,) = (line for line in lines if line.startswith(" 16 GB  fits with "))
    said = re.search(r"fits with 1/(\d) of the micro-batch, \1 x train.accumulation: (\d+\.\d\d) GB$", small)
    assert said, small
    divisor, taken = int(said[1]), said[2]
    halved = door("plan", *options[:4], "--samples", 4 // divisor, *options[6:], "--train.accumulation", divisor)
    (row,) = (line.split() for line in halved.out.splitlines() if line.startswith("lora  bf16 *"))
    assert row[-3] == taken  # which is what that run would take
    assert " 80 GB  fits" in lines
    assert next(line for line in lines if line.startswith("V100")).split() == ["V100", "32", "-", "no", "bf16"]
    assert "epoch" not in done.out


@pytest.mark.slow
def test_the_batches_of_the_data(door: Door, demo_config: Callable[..., Path]) -> None:
    config = demo_config(train={"batch_size": 2, "accumulation": 2}, model={"activation_checkpointing": True})
    done = door("plan", config, "--processes", "2")
    assert done.code == 0, done.err
    assert re.search(r"costliest micro-batch: input_ids \(2, \d+\), .* of the samples \S+, \S+", done.out)
    assert "a typical one takes" in done.out
    assert "activation checkpointing on" in done.out
    assert ", 1 steps in an epoch" in done.out
    assert "h / epoch" in done.out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--positions", "-1"], "--positions is -1: it must be 0 or more"),
        (["--processes", "0"], "--processes is 0: it must be 1 or more"),
        (["--samples", "2"], "--samples is 2 without --positions: give both, or neither"),
        (["--utilisation", "1.5"], "--utilisation is 1.5: it must be above 0 and at most 1"),
        (["--positions", "5000"], "takes 5000 positions, the model has 2048"),
        (["--positions", "50", "--adapter.target_modules", "[nope]"], "matches no layer of the model"),
        (["--data.train", "nowhere.jsonl"], "; to plan without data, give --positions N --samples M"),
    ],
)
def test_wrong_options(
    refusal: Callable[..., str], demo_config: Callable[..., Path], options: list[str], said: str
) -> None:
    assert said in refusal("plan", demo_config(), *options)


def test_the_cheapest_change_comes_first() -> None:
    own = Choice("bf16", "full", False)
    held_and_kept = {
        own: (10e9, 20e9),
        own._replace(checkpointing=True): (10e9, 4e9),
        Choice("native_fp16", "full", False): (8e9, 20e9),
        Choice("bf16", "lora", False): (2e9, 12e9),
        Choice("bf16", "lora", True): (2e9, 2e9),
    }
    asked = []

    def taken(choice: Choice, divisor: int) -> float:
        asked.append(choice)
        return held_and_kept[choice][0] + held_and_kept[choice][1] / divisor

    def changes(size: float, rows: int) -> tuple[list[str], float] | None:
        return changes_that_fit(size, own, {choice: held for choice, (held, _) in held_and_kept.items()}, rows, taken)

    assert changes(40, 4) == ([], 30e9)
    assert changes(24, 4) == (["1/2 of the micro-batch, 2 x train.accumulation"], 20e9)
    assert changes(24, 1) == (["model.activation_checkpointing true"], 14e9)
    halved = ["1/2 of the micro-batch, 2 x train.accumulation", "model.activation_checkpointing true"]
    assert changes(13.5, 2) == (halved, 12e9)
    asked.clear()
    assert changes(6, 1) == (["model.activation_checkpointing true", "adapter.mode lora"], 4e9)
    assert {choice.adapter for choice in asked} == {"lora"}  # what cannot fit is not estimated
    assert changes(2, 8) is None
    assert room(24) == 24e9 * 0.95 - 0.6e9


def test_a_card_without_bfloat16_has_no_rate_for_it() -> None:
    cards = {card.name: card for card in CARDS}
    assert cards["TITAN RTX"].tflops("bf16", tf32=False) is None
    assert cards["TITAN RTX"].tflops("native_fp16", tf32=False) == 130
    assert cards["TITAN RTX"].tflops("fp32", tf32=True) == 16.3
    assert cards["A100 80GB"].tflops("fp32", tf32=True) == 156
    assert "plan" in COMMANDS


def test_stochastic_rounding_comes_before_lora_where_all_weights_train() -> None:
    own = Choice("bf16", "full", True)
    rounded = own._replace(rounded=True)
    others = [*other_choices(own, rounds=True)]
    assert own not in others
    assert [each for each in others if each.rounded] == [rounded._replace(checkpointing=False), rounded]
    assert not any(each.rounded for each in other_choices(own, rounds=False))
    assert not any(each.rounded for each in other_choices(own._replace(adapter="lora"), rounds=True))
    sizes = {each: 30e9 - 15e9 * each.rounded - 25e9 * (each.adapter == "lora") for each in [own, *others]}
    changes = changes_that_fit(24, own, sizes, 1, lambda choice, divisor: sizes[choice])
    assert changes == (["precision.trainable_dtype bf16, precision.masters stochastic"], 15e9)
    sizes[own._replace(mode="amp_fp16")] = 20e9  # another mode comes before it
    assert changes_that_fit(24, own, sizes, 1, lambda choice, _: sizes[choice]) == (["precision.mode amp_fp16"], 20e9)
    back = changes_that_fit(24, rounded, {rounded: 30e9, Choice("fp32", "full", True): 9e9}, 1, lambda *_: 9e9)
    assert back == (["precision.mode fp32", "precision.trainable_dtype auto, precision.masters fp32"], 9e9)
    config = with_choice(RunConfig(adapter=AdapterConfig("full")), rounded)
    assert (config.precision.mode, config.precision.masters) == ("bf16", "stochastic")
    again = with_choice(config, Choice("bf16", "lora", False, True))
    assert (again.adapter.mode, again.precision) == ("lora", config.precision)
    assert with_choice(config, Choice("fp32", "full", False)).precision.masters == "fp32"
