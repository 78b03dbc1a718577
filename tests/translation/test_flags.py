"""Command lines of Higgs Audio v2 scripts are read as argparse reads them."""

import pytest

from rawloop.config import known_keys
from rawloop.errors import UserError
from rawloop.translation.flags import read_flags
from rawloop.translation.higgs import HIGGS


def read(line: str) -> tuple[dict[str, object], list[list[str]], list[str]]:
    return read_flags(line.split(), HIGGS, known_keys())


@pytest.mark.parametrize(
    ("line", "given"),
    [
        ("--learning_rate 5e-5", {"learning_rate": "5e-5"}),
        ("--learning_rate=5e-5", {"learning_rate": "5e-5"}),
        ("--learning-rate 5e-5", {"learning_rate": "5e-5"}),
        ("--output_dir=a=b", {"output_dir": "a=b"}),
        ("--max_steps -1", {"max_steps": "-1"}),
        ("--use_lora --bf16", {"use_lora": True, "bf16": True}),
        ("--use_lora true --bf16 False", {"use_lora": True, "bf16": False}),
        ("--use_lora=1 --bf16=no", {"use_lora": True, "bf16": False}),
        ("--no_remove_unused_columns --no-use_lora", {"remove_unused_columns": False, "use_lora": False}),
        ("--lora_target_modules q_proj v_proj --bf16", {"lora_target_modules": ["q_proj", "v_proj"], "bf16": True}),
        ("--lora_target_modules q_proj,v_proj", {"lora_target_modules": "q_proj,v_proj"}),
        ("--report_to tensorboard wandb", {"report_to": ["tensorboard", "wandb"]}),
        ("--resume_from_checkpoint", {"resume_from_checkpoint": True}),
        ("--resume_from_checkpoint out/checkpoint-5", {"resume_from_checkpoint": "out/checkpoint-5"}),
        ("--deepspeed z3.json --fsdp", {"deepspeed": "z3.json", "fsdp": True}),
    ],
)
def test_flags_are_read_in_all_their_forms(line: str, given: dict[str, object]) -> None:
    assert read(line) == (given, [], [])


def test_options_of_rawloop_may_stand_between() -> None:
    given, options, twice = read("--bf16 --data.codes c --optim.beta2=0.9 --adapter.freeze+ a --seed 3 --resume auto")
    assert given == {"bf16": True, "seed": "3"}
    assert options == [["--data.codes", "c"], ["--optim.beta2=0.9"], ["--adapter.freeze+", "a"], ["--resume", "auto"]]
    assert twice == []


def test_of_a_flag_that_is_given_twice_the_last_counts() -> None:
    assert read("--eval_steps 5 --bf16 --eval_steps=7") == ({"eval_steps": "7", "bf16": True}, [], ["eval_steps"])


def test_all_unknown_flags_are_named_at_once() -> None:
    with pytest.raises(UserError) as caught:
        read("stray --lernin_rate 1 --bf16 --optim.lrr 2 --xyzzy --no_learning_rate --seed 1 2 --data.codes c")
    line = str(caught.value)
    for part in (
        "'stray'",
        "--lernin_rate (did you mean 'learning_rate'?)",
        "--optim.lrr (did you mean 'optim.lr'?)",
        "--xyzzy",
        "--no_learning_rate (did you mean 'learning_rate'?)",
        "'2' after --seed",
    ):
        assert part in line, line
    assert "data.codes" not in line
    assert "bf16" not in line


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--learning_rate", "--learning_rate needs a value after it"),
        ("--learning_rate --bf16", "--learning_rate needs a value after it"),
        ("--lora_target_modules", "--lora_target_modules needs a value after it"),
        ("--bf16=maybe", "--bf16 is 'maybe': it must be true or false"),
    ],
)
def test_a_flag_without_its_value_is_refused(line: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        read(line)
    assert str(caught.value).startswith(words)
