"""How a run's config is read: files, options, their order, and one clear line for every mistake in them."""

import contextlib
import dataclasses
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from rawloop.cli.options import EvaluateOptions
from rawloop.cli.table import TABLE
from rawloop.config import (
    ALIASES,
    RunConfig,
    known_keys,
    moved_run,
    parse,
    to_yaml,
)
from rawloop.errors import Mistakes, UserError
from rawloop.keys import field_help, keys_of
from rawloop.precision.config import LossScaleConfig
from rawloop.settings import RecordsConfig, SamplingConfig
from rawloop.trainer_names import HF_NAMES, NO_COUNTERPART, SCRIPT_NAMES


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Give `write(text, name="run.yaml")`, which writes a config file and returns its path."""

    def run(text: str, name: str = "run.yaml") -> Path:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return run


def read(*arguments: str | Path) -> RunConfig:
    return parse([str(argument) for argument in arguments], "rawloop train")[0]


def refusal(*arguments: str | Path) -> str:
    """The one line with which the arguments are refused."""
    with pytest.raises(UserError) as caught:
        read(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- where values come from --------------------------------------------------------------------------------------


def test_without_arguments_every_key_has_its_default() -> None:
    assert read() == RunConfig()


def test_a_file_sets_what_it_names_and_nothing_else(write: Callable[..., Path]) -> None:
    config = read("--config", write("output: runs/x\noptim:\n  lr: 1e-5\nadapter: {target_modules: [q_proj]}\n"))
    assert (config.output, config.optim.lr, config.adapter.target_modules) == ("runs/x", 1e-5, ["q_proj"])
    config.output, config.optim.lr = RunConfig().output, RunConfig().optim.lr
    config.adapter.target_modules = RunConfig().adapter.target_modules
    assert config == RunConfig()


@pytest.mark.parametrize("equals", [False, True])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_command_line_overrides_the_file_wherever_it_stands(
    write: Callable[..., Path], place: int, equals: bool
) -> None:
    file = write("seed: 1\ntrain:\n  max_steps: 5\n  batch_size: 3\n")
    arguments = [["--seed=2"], ["--train.max_steps", "7"]]
    arguments.insert(place, [f"--config={file}"] if equals else ["--config", str(file)])
    config = read(*(word for words in arguments for word in words))
    assert (config.seed, config.train.max_steps, config.train.batch_size) == (2, 7, 3)


def test_a_later_file_overrides_an_earlier_one(write: Callable[..., Path]) -> None:
    first, second = write("seed: 1\noutput: runs/a\n", "a.yaml"), write("seed: 2\n", "b.yaml")
    assert (read("--config", first, "--config", second).seed, read("--config", second, "--config", first).seed) == (
        2,
        1,
    )
    assert read("--config", first, "--output", "runs/c", f"--config={second}").output == "runs/c"


def test_lists_and_weights_can_be_replaced_and_added_to(write: Callable[..., Path]) -> None:
    file = write("adapter: {modules_to_save: [a]}\nmodel: {stream_weights: {text: 0.5}}\n")
    config = read("--config", file, "--adapter.modules_to_save+", "b", "--adapter.target_modules", "[q_proj, v_proj]")
    assert config.adapter.modules_to_save == ["a", "b"]
    assert config.adapter.target_modules == ["q_proj", "v_proj"]
    assert config.model.stream_weights == {"text": 0.5}
    assert read("--model.stream_weights.text", "0").model.stream_weights == {"text": 0.0}
    more = write("model: {stream_weights: {audio: 2, text: 3}}\n", "more.yaml")
    assert read(more, file).model.stream_weights == {"text": 0.5}  # a file replaces it
    assert read(more, "--model.stream_weights.text", "0").model.stream_weights == {"audio": 2.0, "text": 0.0}
    assert read(more, "--model.stream_weights", "{text: 1}").model.stream_weights == {"text": 1.0}
    assert read("--adapter.freeze+", "[a, b]", "--adapter.freeze+=c").adapter.freeze == ["a", "b", "c"]
    assert "unknown key 'seed+' on the command line (did you mean 'seed'?)" in refusal("--seed+", "1")


@pytest.mark.parametrize("alias", ["--disable_eval", "--disable_evaluation"])
def test_aliases_switch_evaluation_off(write: Callable[..., Path], alias: str) -> None:
    file = write("evaluation:\n  enabled: true\n  every: 7\n")
    config = read(alias, "--config", file)
    assert (config.evaluation.enabled, config.evaluation.every) == (False, 7)
    assert f"{alias} takes no value" in refusal(f"{alias}=true")


def test_further_options_of_a_command_may_be_called_like_a_group(write: Callable[..., Path]) -> None:
    file = str(write("checkpoint: {keep_last: 7}\n"))
    for arguments in (["--checkpoint", "best"], ["--checkpoint=latest", "--checkpoint", "best"]):
        words = [*arguments, "--config", file, "--checkpoint.save_every", "9"]
        config, options, _ = parse(words, "rawloop x", EvaluateOptions)
        assert options == EvaluateOptions(checkpoint="best")
        assert (config.checkpoint.save_every, config.checkpoint.keep_last) == (9, 7)
    assert parse([], "rawloop x", EvaluateOptions).options == EvaluateOptions()
    with pytest.raises(UserError, match="--checkpoint needs a value"):
        parse(["--checkpoint", "--seed", "1"], "rawloop x", EvaluateOptions)


def test_the_resolved_config_reads_back_as_it_was(write: Callable[..., Path]) -> None:
    config = read("--optim.lr", "1e-5", "--data.train", "dữ liệu", "--adapter.freeze", "['*.norm.*']", "--seed", "3")
    config.model.stream_weights = {"text": 0.25}
    assert read("--config", write(to_yaml(config))) == config
    assert read("--config", write(to_yaml(RunConfig()))) == RunConfig()


def test_the_config_of_a_run_that_was_copied_is_told_apart(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(*arguments: str | Path) -> str | None:
        return moved_run(parse([str(argument) for argument in arguments], "rawloop train"))

    monkeypatch.chdir(tmp_path)
    for name in ("a", "v"):
        (tmp_path / "runs" / name / "checkpoints").mkdir(parents=True)
    own, copied = (write("output: runs/a\nseed: 3\n", f"runs/{name}/config.yaml") for name in ("a", "v"))
    more = write("seed: 4\n", "more.yaml")
    line = "the config is a run's own, in runs/v, and its output is runs/a: pass --output runs/v to work there"
    relative = copied.relative_to(tmp_path)
    assert told("--config", relative) == told(f"--config={relative}", "--config", more, "--seed", "1") == line
    assert told("--config", copied, "--output", "runs/a") is told("--config", copied, "--output=runs/c") is None
    assert told("--config", copied, "--config", write("output: runs/c\n")) is None
    assert told("--config", own) is told("--config", own.relative_to(tmp_path)) is told() is None
    (tmp_path / "runs" / "v" / "checkpoints").rmdir()
    assert told("--config", relative) is None  # no run's folder
    (tmp_path / "runs" / "v" / "metrics.jsonl").touch()
    assert told("--config", relative) == line


def groups() -> list[tuple[str, Any]]:
    hints = get_type_hints(RunConfig)
    return [(name, hint) for name, hint in hints.items() if dataclasses.is_dataclass(hint)]


def test_a_file_may_stand_alone_and_all_files_keep_their_order(write: Callable[..., Path]) -> None:
    first = write("seed: 1\noutput: runs/a\n", "a.yaml")
    second = write("seed: 2\ntrain: {max_steps: 5}\n", "b.yml")
    third = write("output: runs/c\n", "c")  # a file of any name
    assert read(first, second) == read("--config", first, "--config", second) == read(first, f"--config={second}")
    assert read("--config", first, second) != read(second, "--config", first)
    assert (read(second, first).seed, read(first, second).seed) == (1, 2)
    config = read("--optim.lr", "1e-5", first, "--seed", "7", second, "--disable_eval", third, "--train.max_steps=3")
    assert (config.seed, config.output, config.train.max_steps, config.optim.lr) == (7, "runs/c", 3, 1e-5)
    assert not config.evaluation.enabled


def test_words_that_yaml_takes_for_true_and_false_are_words(write: Callable[..., Path]) -> None:
    config = read(write("watch: {spikes: off}\noutput: on\n"))
    assert (config.watch.spikes, config.output) == ("off", "on")
    for word, truth in (("off", False), ("no", False), ("yes", True), ("On", True), ("true", True), ("FALSE", False)):
        assert read(write(f"data: {{packing: {word}}}\n")).data.packing is truth
        assert read("--data.packing", word).data.packing is truth


# -- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ("optim.lrr", "optim.lr"),
        ("optm.lr", "optim.lr"),
        ("lr", "optim.lr"),
        ("max_steps", "train.max_steps"),
        ("seeds", "seed"),
        ("batch_size", "evaluation.batch_size' or 'train.batch_size"),
        ("train.max_step", "train.max_steps"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(
    write: Callable[..., Path], tmp_path: Path, given: str, near: str
) -> None:
    hint = f"(did you mean '{near}'?)"
    line = refusal(f"--{given}", "1")
    assert line.startswith(f"unknown key '{given}' on the command line {hint}"), line
    assert "rawloop train --help" in line
    nested = given.replace(".", ":\n  ") + ": 1\n"
    assert refusal("--config", write(nested)) == f"unknown key '{given}' in {tmp_path / 'run.yaml'} {hint}"


@pytest.mark.parametrize("group", ["checkpoint.", ""])
def test_a_key_of_hf_trainer_is_answered_with_ours(write: Callable[..., Path], group: str) -> None:
    line = refusal(f"--{group}save_total_limit", "3")
    assert "(what HF Trainer calls save_total_limit is 'checkpoint.keep_last' here)" in line
    assert "'checkpoint.keep_last' here" in refusal("--config", write("checkpoint: {save_total_limit: 3}\n"))
    assert set(HF_NAMES.values()) | set(SCRIPT_NAMES.values()) <= known_keys()
    assert not set(HF_NAMES) & {key.rpartition(".")[2] for key in known_keys()}


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("fp16", "what HF Trainer calls fp16 is 'precision.mode' here"),
        ("bf16", "what HF Trainer calls bf16 is 'precision.mode' here"),
        ("greater_is_better", "what HF Trainer calls greater_is_better is 'evaluation.best_mode' here"),
        ("lora_r", "what PEFT calls lora_r is 'adapter.rank' here"),
        ("data_seed", "what HF Trainer calls data_seed is 'seed' here"),
        ("run_name", "what HF Trainer calls run_name is 'output' here"),
        ("do_eval", "what HF Trainer calls do_eval is 'evaluation.enabled' here"),
        ("use_lora", "use_lora of the scripts for Higgs Audio is 'adapter.mode' here; `rawloop train-higgs` takes it"),
        (
            "train_data_dir",
            "train_data_dir of the scripts for Higgs Audio is 'data.train' here; `rawloop train-higgs` t",
        ),
        ("disable_tqdm", "HF Trainer's disable_tqdm: 'records.progress' set to false is that"),
        ("save_strategy", "HF Trainer's save_strategy: 'checkpoint.save_every' is a number of steps"),
        ("load_best_model_at_end", "HF Trainer's load_best_model_at_end: there is none; the best model is always kept"),
        ("deepspeed", "HF Trainer's deepspeed: there is none; several processes train by DDP"),
        ("deepspeed.stage", "HF Trainer's deepspeed: there is none; several processes train by DDP"),
        *(
            (name, f"HF Trainer's {name}: there is none; ")
            for name in ("logging_dir", "overwrite_output_dir", "save_only_model", "ignore_data_skip")
        ),
    ],
)
def test_names_from_elsewhere_are_answered_in_a_few_words(write: Callable[..., Path], name: str, answer: str) -> None:
    assert f" ({answer}" in refusal(f"--{name}", "1")
    assert f" ({answer}" in refusal("--config", write(name.replace(".", ":\n  ") + ": 1\n"))
    assert "did you mean" not in refusal(f"--{name}", "1")


def test_answers_to_names_from_elsewhere_are_true() -> None:
    words = " ".join(NO_COUNTERPART.values())
    assert set(re.findall(r"'([\w.]+)'", words)) <= known_keys()
    assert not set(NO_COUNTERPART) & {*HF_NAMES, *(key.rpartition(".")[2] for key in known_keys())}


def test_a_mistyped_alias_is_refused_with_the_right_one() -> None:
    assert "(did you mean 'disable_eval'?)" in refusal("--disable_evl")


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("optim.lr", "fast", "a number"),
        ("seed", "1.5", "a whole number"),
        ("train.max_steps", "ten", "a whole number"),
        ("evaluation.enabled", "maybe", "true or false"),
        ("adapter.target_modules", "q_proj", "a list such as '[a, b]'"),
        ("adapter.mode", "lorra", "one of 'lora', 'full'"),
        ("device", "gpu", "one of 'auto', 'cuda', 'mps', 'cpu'"),
        ("data.on_bad_sample", "ignore", "one of 'stop', 'skip'"),
    ],
)
def test_a_wrong_type_is_refused_with_its_origin(write: Callable[..., Path], key: str, value: str, wanted: str) -> None:
    line = refusal(f"--{key}", value)
    assert line == f"{key} is '{value}' (from the command line): it must be {wanted}"
    *groups, name = key.split(".")
    file = write("".join(f"{group}:\n  " for group in groups) + f"{name}: {value}\n")
    assert refusal("--config", file) == f"{key} is '{value}' (from {file}): it must be {wanted}"


def test_a_number_where_a_string_belongs_is_refused_with_the_cure(write: Callable[..., Path]) -> None:
    assert refusal("--config", write("output: 2024\n")).endswith("it must be a string: put it in quotes")
    assert read("--config", write("output: '2024'\n")).output == "2024"


def test_the_blame_falls_on_who_is_wrong(write: Callable[..., Path]) -> None:
    wrong, right = write("seed: hello\n", "wrong.yaml"), write("seed: 1\n", "right.yaml")
    assert f"seed is 'hello' (from {wrong})" in refusal("--config", wrong, "--seed", "2")
    assert f"seed is 'hello' (from {wrong})" in refusal("--seed", "2", "--config", wrong, "--config", right)
    assert "seed is 'hello' (from the command line)" in refusal("--config", right, "--seed", "hello")


def test_values_that_a_part_refuses_are_named_with_their_origin(write: Callable[..., Path]) -> None:
    file = write("optim: {lr: -1}\n")
    assert refusal(file) == f"optim.lr is -1.0: it must be a number above 0 (optim.lr from {file})"
    file = write("evaluation: {every: 0}\n")
    line = refusal(file, "--optim.lr", "1", "--evaluation.batch_size", "2")
    assert line.endswith(f"(evaluation.every from {file}, evaluation.batch_size from the command line)")
    assert "output is empty" in refusal("--output", "")


@pytest.mark.parametrize("text", ["optim: 3\n", "optim:\n", "optim: {}\n", "optim: [1]\n"])
def test_a_group_given_as_a_value_is_refused_with_its_keys(write: Callable[..., Path], text: str) -> None:
    file = write(text)
    line = refusal("--config", file)
    assert line == f"'optim' in {file} is a group: give values to its keys, such as optim.beta1, optim.beta2, optim.eps"
    assert "'optim' on the command line is a group" in refusal("--optim", "3")


NESTED = (("precision.loss_scale", LossScaleConfig), ("listen.sampling", SamplingConfig))
KEYS = {
    (f"{group}.{item.name}" if group else item.name): hints[item.name]
    for group, owner in (("", RunConfig), *NESTED, *groups())
    for hints in (get_type_hints(owner),)
    for item in dataclasses.fields(owner)
    if not dataclasses.is_dataclass(hints[item.name])
}


def test_the_keys_are_all_keys() -> None:
    assert set(KEYS) == known_keys()


@pytest.mark.parametrize("key", sorted(key for key, hint in KEYS.items() if type(None) not in get_args(hint)))
def test_null_is_refused_wherever_it_stands(write: Callable[..., Path], key: str) -> None:
    *groups, name = key.split(".")
    above = "".join(f"{'  ' * depth}{group}:\n" for depth, group in enumerate(groups))
    file = write(f"{above}{'  ' * len(groups)}{name}:\n")
    assert refusal("--config", file).startswith(f"{key} is null (from {file}): it must be ")
    if KEYS[key] is not str:
        assert re.match(rf"{re.escape(key)} is '' \(from the command line\): it must be ", refusal(f"--{key}", ""))


def test_null_inside_a_list_or_a_dict_is_refused(write: Callable[..., Path]) -> None:
    for text in ("adapter: {freeze: [null]}", "checks: {allow: [null]}"):
        file = write(text)
        assert f" is '[None]' (from {file}): 'None' in it must be " in refusal("--config", file)
    file = write("model: {stream_weights: {text: null}}")
    assert refusal(file) == f"model.stream_weights.text is null (from {file}): it must be a number"
    for text in ("null", "~"):
        assert f"seed is null (from {write(f'seed: {text}')})" in refusal("--config", write(f"seed: {text}"))
    assert "seed is 'null' (from the command line)" in refusal("--seed", "null")
    assert read("--config", write("precision: {fallback: null}\ndata: {train: null, default_scene:}\n")) == read(
        "--data.default_scene", "null"
    )


@pytest.mark.parametrize("key", ["seed", "optim.lr", "adapter.freeze", "model.stream_weights"])
def test_what_no_key_takes_is_refused_in_a_line(write: Callable[..., Path], key: str) -> None:
    bomb = (
        "[&a [x,x,x,x,x,x,x,x,x,x], &b [*a,*a,*a,*a,*a,*a,*a,*a,*a], &c [*b,*b,*b,*b,*b,*b,*b,*b], [*c,*c,*c,*c,*c,*c]]"
    )
    values = ["9" * 5000, "[" * 1500 + "]" * 1500, "&a [*a]", bomb, "x" * 100_000, "2020-99-99", "nan", "1" + "0" * 400]
    for value in values:
        *groups, name = key.split(".")
        said = refusal(
            "--config", write("".join(f"{group}: {{" for group in groups) + f"{name}: {value}" + "}" * len(groups))
        )
        assert len(said) < 400
        said = refusal(f"--{key}", value)
        assert len(said) < 400
        assert "Parser key" not in said


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("seed: 10000000000000000000", "seed is '10000000000000000000' (from FILE): it must be a whole number of at "),
        ("train: {epochs: 1.0e+308}", "train.epochs (1e+308) above 0 and below 1e9"),
        ('output: "a\\0b"', "output is 'a\\x00b' (from FILE): it has characters that no text has"),
        ('output: "\\ud800"', "output is '\\ud800' (from FILE): it has characters that no text has"),
        ("seed: 010", "FILE line 1: YAML reads 010 as an octal number"),
        ("train: {max_steps: 1:30}", "FILE line 1: YAML reads 1:30 as a number to base 60"),
        ("optim: {lr: 1:30.5}", "FILE line 1: YAML reads 1:30.5 as a number to base 60"),
        ("seed: !!int x", "FILE is not valid YAML: invalid literal"),
        ("output: !!timestamp x", "FILE line 1 has a value of type timestamp"),
        ("seed: true", "seed is 'True' (from FILE): it must be a whole number"),
        ("checks: {enabled: 1}", "checks.enabled is '1' (from FILE): it must be true or false"),
        ("1: 2", "FILE line 1: '1' is a key and no string"),
        ("true: 2", "FILE line 1: 'true' is a key and no string"),
        ("on: 2", "unknown key 'on' in FILE"),
        ("? [a]\n: 2", "FILE line 1: a list or a mapping is a key and no string"),
        ("model: {stream_weights: {1: 2}}", "FILE line 1: '1' is a key and no string"),
        ("optim: {lr: 1, lr: 2}", "FILE line 1: 'lr' stands in line 1 already"),
        ("optim.lr: 1\noptim: {lr: 2}", "FILE: 'optim.lr' stands there twice, nested and dotted: keep one"),
        (
            "model.stream_weights.text: 1\nmodel: {stream_weights: {text: 2}}",
            "'model.stream_weights.text' stands there",
        ),
        ("model: {stream_weights: {}}\nmodel.stream_weights.text: 1", "'model.stream_weights.text' stands there"),
        ("a: [{b: 1, b: 2}]", "FILE line 1: 'b' stands in line 1 already"),
        ("# " + "x" * 1_000_000, "FILE is larger than 1,000,000 bytes"),
    ],
)
def test_what_yaml_takes_in_silence_is_refused(write: Callable[..., Path], text: str, problem: str) -> None:
    file = write(text)
    assert problem.replace("FILE", str(file)) in refusal("--config", file)


def test_a_file_may_be_dotted_merged_and_a_pipe(write: Callable[..., Path], tmp_path: Path) -> None:
    text = "\ufeffoptim.lr: 1\nmodel.stream_weights.text: 2\noutput: 2020-01-01\n"
    config = read("--config", write(text))
    assert (config.optim.lr, config.model.stream_weights, config.output) == (1.0, {"text": 2.0}, "2020-01-01")
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text(text))
    writer.start()
    parsed = parse([str(tmp_path / "pipe")], "rawloop train")
    assert parsed.config == config
    writer.join()
    assert moved_run(parsed) is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("- seed\n- 1\n", "holds a list"),
        ("just words\n", "holds a str"),
        ("seed: 1\noptim: {lr: 1\nx: ]\n", "line 3 is not valid YAML"),
        ("seed: 1\n\ttrain: 2\n", "line 2 is not valid YAML"),
        ("a: \x00\n", "is not valid YAML"),
        ("seed: 1\noutput: x\nseed: 2\n", "line 3: 'seed' stands in line 1 already"),
        ("optim:\n  lr: 1\n  lr: 2\n", "line 3: 'lr' stands in line 2 already"),
    ],
)
def test_a_file_that_is_no_config_is_refused(write: Callable[..., Path], text: str, problem: str) -> None:
    file = write(text)
    line = refusal("--config", file)
    assert line.startswith(str(file))
    assert problem in line


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"
    for arguments in (["--config", missing], [missing]):
        assert refusal(*arguments) == f"the config '{missing}' cannot be read: No such file or directory"
    assert "Is a directory" in refusal("--config", tmp_path)
    assert refusal("--config") == "--config needs a value after it"
    (tmp_path / "latin.yaml").write_bytes("output: größe\n".encode("latin-1"))
    assert "is not UTF-8 (byte 10)" in refusal("--config", tmp_path / "latin.yaml")


def test_words_that_are_no_options_are_refused() -> None:
    assert refusal("seed") == "'seed' is no YAML file: write --seed VALUE"
    assert refusal("seed=3 4") == "'seed=3 4' is no YAML file: write --seed '3 4'"
    assert refusal("-seed=3") == "'-seed=3' is no YAML file: write --seed 3"
    assert refusal("--seed") == "--seed needs a value after it"
    assert refusal("--data.packing") == "--data.packing needs a value after it: true or false"
    assert refusal("--adapter.mode") == "--adapter.mode needs a value after it: one of 'lora', 'full'"


@pytest.mark.parametrize(
    ("command", "more"), [("train", " --resume latest"), ("evaluate", " --checkpoint best"), ("precision probe", "")]
)
def test_the_folder_of_a_run_is_answered_with_what_to_write(tmp_path: Path, command: str, more: str) -> None:
    run = tmp_path / "runs" / "voice"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError) as caught:
        parse([str(run)], f"rawloop {command}", TABLE[command].options, TABLE[command].unread())
    written = f"write `rawloop {command} {run}/config.yaml{more}`"
    assert str(caught.value) == f"'{run}' is the folder of a run, and no YAML file: {written}"
    assert f"'{tmp_path}' is a folder, and no YAML file: name one, such as run.yaml, or" in refusal(tmp_path)


def mistakes(*arguments: str | Path) -> list[str]:
    """The lines of several mistakes."""
    with pytest.raises(Mistakes) as caught:
        read(*arguments)
    head, *lines = str(caught.value).splitlines()
    assert head.startswith(f"{len(lines)} mistakes")
    assert all(line.startswith("  ") for line in lines)
    return [line.strip() for line in lines]


def test_all_mistakes_are_told_at_once_each_with_its_place(write: Callable[..., Path]) -> None:
    first = write("optim: {lrr: 1, lr: fast}\ntrain: {batch_size: null}\nresume_force: [seed]\n", "a.yaml")
    second = write("seed: [1]\noptim: 3\n", "b.yaml")
    broken, missing = write("seed: 1\nseed: 2\n", "c.yaml"), first.parent / "d.yaml"
    line = ["--evaluation.every", "0", "--learning_rate", "1", "--seeds=2", "--data.packing", "--max_grad_norm", "1"]
    assert mistakes(first, second, broken, missing, "words", *line) == [
        f"'resume_force' in {first} is no key any more: take it out, and start another run from the checkpoint's "
        "weights with --init_from CHECKPOINT",
        f"unknown key 'optim.lrr' in {first} (did you mean 'optim.lr'?)",
        f"optim.lr is 'fast' (from {first}): it must be a number",
        f"train.batch_size is null (from {first}): it must be a whole number; leave the key out for its default, 1",
        f"seed is '[1]' (from {second}): it must be a whole number",
        f"'optim' in {second} is a group: give values to its keys, such as optim.beta1, optim.beta2, optim.eps",
        f"{broken} line 2: 'seed' stands in line 1 already: keep one",
        f"the config '{missing}' cannot be read: No such file or directory",
        "'words' is no YAML file: name one, such as run.yaml, or give values as --KEY VALUE",
        "unknown key 'learning_rate' on the command line (what HF Trainer calls learning_rate is 'optim.lr' here)",
        "unknown key 'seeds' on the command line (did you mean 'seed'?)",
        "--data.packing needs a value after it: true or false",
        "unknown key 'max_grad_norm' on the command line (what HF Trainer calls max_grad_norm is 'optim.max_norm' "
        "here)",
        "evaluation.every (0) and evaluation.batch_size (4) must be 1 or more (evaluation.every from the command line)",
    ]


def test_a_part_is_not_checked_with_the_default_of_a_wrong_value() -> None:
    line = refusal("--precision.mode", "fp17", "--precision.trainable_dtype", "bf16")
    assert line.startswith("precision.mode is 'fp17' (from the command line)")
    assert len(mistakes("--optim.lr", "0", "--evaluation.every", "0", "--checkpoint.max_failures", "0")) == 3


def test_where_all_keys_are_listed_is_told_once() -> None:
    with pytest.raises(Mistakes) as caught:
        read("--a", "1", "--b", "1")
    assert str(caught.value).startswith("2 mistakes (`rawloop train --help all` lists all keys):\n")
    assert str(caught.value).count("--help all") == 1


def test_a_key_with_line_breaks_stays_in_its_line(write: Callable[..., Path]) -> None:
    assert refusal(write('"a\\nb": 1\n')).startswith("unknown key 'a b' in ")
    assert len(mistakes(write('"a\\nb": 1\n"c\\nd": 1\n'))) == 2


# Options of other trainers and of scripts that are not in the tables: none of them is like a key of ours.
FOREIGN = """
lora tp ep fp8 lb 4bit sp
use_gpu train_data_path validation_split checkpoint_dir lora_path model_type rank_zero eval_data num_gpus voice_name
epochs_per_eval do_sample repetition_penalty neftune_alpha dataset_format cutoff_len finetuning_type stage val_size
"""


@pytest.mark.parametrize("name", FOREIGN.split())
def test_no_hint_is_better_than_a_wrong_one(name: str) -> None:
    line = refusal(f"--{name}", "x")
    assert line.startswith(f"unknown key '{name}' on the command line")
    assert "did you mean" not in line


@pytest.mark.parametrize(
    "words", [["--use_thing", "true"], ["--use_thing", "--seed=1"], ["--use_thing=1"], ["--use_thing", "run.yaml"]]
)
def test_the_value_of_an_unknown_option_is_no_second_mistake(write: Callable[..., Path], words: list[str]) -> None:
    with contextlib.chdir(write("seed: 3\n").parent):
        assert refusal(*words).startswith("unknown key 'use_thing' on the command line: ")
    assert len(mistakes("--use_thing", write("seed: x\n"))) == 2  # a file is no value of an unknown option


def test_a_command_refuses_keys_that_it_does_not_read_on_the_command_line_alone(write: Callable[..., Path]) -> None:
    unread = TABLE["prepare"].unread()
    file = str(write("optim: {lr: 3}\nmodel: {stream_weights: {text: 1}}\n"))
    assert parse([file], "rawloop prepare", unread=unread).config.optim.lr == 3
    with pytest.raises(UserError) as caught:
        parse([file, "--optim.lr", "1", "--seed=2", "--disable_eval", "--seed=3"], "rawloop prepare", unread=unread)
    assert str(caught.value) == (
        "`rawloop prepare` does not read --optim.lr, --seed, --evaluation.enabled: leave them out here; a YAML file "
        "may have them, for all commands"
    )
    with pytest.raises(UserError, match=r"does not read --seed: leave it out here; a YAML file may have it, for all"):
        parse([file, "--seed=2"], "rawloop prepare", unread=unread)
    with pytest.raises(UserError, match=r"unknown key 'optim\.lrr' on the command line: "):  # no hint that is refused
        parse([file, "--optim.lrr", "1"], "rawloop prepare", unread=unread)
    with pytest.raises(UserError, match=r"optim\.lr is -1\.0: it must be"):  # a file is for all commands
        parse([str(write("optim: {lr: -1}\n"))], "rawloop prepare", unread=unread)


# -- keys --------------------------------------------------------------------------------------------------------


def owners(owner: type = RunConfig) -> list[type]:
    hints = get_type_hints(owner)
    inside = [hints[item.name] for item in dataclasses.fields(owner) if dataclasses.is_dataclass(hints[item.name])]
    return [owner, *(further for hint in inside for further in owners(hint))]


@pytest.mark.parametrize("owner", owners(), ids=lambda owner: owner.__name__)
def test_every_key_is_explained(owner: type) -> None:
    summary, texts = field_help(owner)
    assert summary.endswith(".")
    assert sorted(texts) == sorted(item.name for item in dataclasses.fields(owner))
    assert all(texts.values()), texts


def test_aliases_stand_for_options_that_exist() -> None:
    assert all(read(alias) == read(option) for alias, option in ALIASES.items())
    assert {option.partition("=")[0].removeprefix("--") for option in ALIASES.values()} <= known_keys()


def test_an_unexplained_field_is_no_key() -> None:
    @dataclasses.dataclass
    class Bare:
        """A config whose author forgot its Args."""

        width: int = 3

    with pytest.raises(KeyError, match="width"):
        keys_of(Bare)


def test_the_shipped_keys_round_trip_through_plain_yaml() -> None:
    assert yaml.safe_load(to_yaml(RunConfig())) == dataclasses.asdict(RunConfig())


def test_the_config_of_an_older_run_is_read(write: Callable[..., Path]) -> None:
    assert read("--config", write("seed: 3\nresume_force: []\n")).seed == 3
    said = refusal("--config", write("resume_force: [seed]\n"))
    assert said.endswith(
        "is no key any more: take it out, and start another run from the checkpoint's weights with "
        "--init_from CHECKPOINT"
    )


def test_the_sinks_of_an_older_run_are_read(write: Callable[..., Path], tmp_path: Path) -> None:
    older = "records: {tensorboard: true, wandb: true, wandb_project: voices, progress: false}\n"
    records = read("--config", write(older)).records
    assert (records.report_to, records.project, records.progress) == (["tensorboard", "wandb"], "voices", False)
    assert read("--config", write("records: {tensorboard: false, wandb: false}\n")).records == RecordsConfig()
    said = refusal("--config", write("records: {tensorboard: true, report_to: [mlflow]}\n"))
    assert f"{tmp_path / 'run.yaml'} has 'records.tensorboard' beside 'records.report_to', which replaced it" in said
    assert "'records.wandb' in" in refusal("--config", write("records: {wandb: 1}\n"))
    assert "(it is 'records.report_to' now)" in refusal("--records.wandb", "true")


def test_the_config_is_there_without_torch() -> None:
    """Tools that write or check configs should not wait for torch, transformers and peft."""
    code = (
        "import sys; from rawloop import RunConfig; from rawloop.config import parse, to_yaml; to_yaml(RunConfig()); "
        "print([name for name in ('torch', 'transformers', 'peft', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout == "[]\n"
