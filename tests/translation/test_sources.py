"""Settings in files: which program they are of, what a Python file says without being run, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from rawloop.errors import UserError
from rawloop.translation.sources import read_sources

SCRIPT = """
import os
from peft import LoraConfig, TaskType
import transformers

LR = 2e-5
EPOCHS: int = 3
TWICE = 1
TWICE = 2
LAYERS = ["q_proj", "v_proj"]
EXTRA = {"seed": 7, "bf16": True}

def main(batch=4):
    args = transformers.TrainingArguments(
        "out",
        learning_rate=LR,
        num_train_epochs=EPOCHS,
        warmup_steps=TWICE,
        per_device_train_batch_size=batch,
        max_steps=-1,
        save_steps=10 * 100,
        run_name=os.environ["NAME"],
        logging_steps=5,
        **EXTRA,
        **os.environ,
    )
    args.logging_steps = 9
    raise SystemExit("it was run")
    LoraConfig(r=8, target_modules=LAYERS, task_type=TaskType.CAUSAL_LM, lora_alpha=unknown)

main()
"""


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_sources(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_python_file_is_read_and_not_run(tmp_path: Path) -> None:
    training, lora = read_sources(write(tmp_path, "train.py", SCRIPT))
    assert training.place == f"{tmp_path / 'train.py'} line 14 (TrainingArguments)"
    assert training.given == {
        "output_dir": "out",
        "learning_rate": 2e-5,
        "num_train_epochs": 3,
        "max_steps": -1,
        "seed": 7,
        "bf16": True,
    }
    assert training.unread == {
        "warmup_steps": "TWICE (line 18)",
        "per_device_train_batch_size": "batch (line 19)",
        "save_steps": "10 * 100 (line 21)",
        "run_name": "os.environ['NAME'] (line 22)",
        "logging_steps": "it is set again in line 27",
        "**": "os.environ (line 25)",
    }
    assert (lora.given, set(lora.unread)) == (
        {"r": 8, "target_modules": ["q_proj", "v_proj"]},
        {"task_type", "lora_alpha"},
    )
    assert training.implied == lora.implied == ()


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("TrainingArguments('out')", True),
        ("SFTConfig(output_dir='out')", True),
        ("TrainingArguments('out')\nmodel = get_peft_model(model, DeloraConfig())", False),
        ("SFTTrainer(args=SFTConfig('out'), peft_config=config)", False),
    ],
)
def test_without_lora_all_weights_are_trained(tmp_path: Path, text: str, full: bool) -> None:
    (source,) = read_sources(write(tmp_path, "train.py", text))
    assert [found.settings for found in source.implied] == ([{"adapter.mode": "full"}] if full else [])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1", "has no call of TrainingArguments, Seq2SeqTrainingArguments, SFTConfig, LoraConfig: save them with"),
        ("HfArgumentParser(TrainingArguments)", "its values come from a command line"),
        ("a = 1\nDPOConfig(beta=0.1)", "but DPOConfig in line 2: rawloop trains on given answers"),
        ("TrainingArguments('a')\nTrainingArguments('b')", "in line 1, TrainingArguments in line 2: copy"),
        ("TrainingArguments('a')\nLoraConfig()\nLoraConfig()", "LoraConfig in line 2, LoraConfig in line 3: copy"),
        ("a = 1\nTrainingArguments(", "line 2 is not valid Python"),
        ("TrainingArguments(a=" + "(" * 500 + ")" * 500 + ")", "is not valid Python"),
        ("\0", "is not valid Python"),
    ],
)  # fmt: skip
def test_python_files_that_are_refused(tmp_path: Path, text: str, words: str) -> None:
    line = refusal(write(tmp_path, "train.py", text))
    assert line.startswith(str(tmp_path / "train.py"))
    assert words in line


def test_a_pickle_is_refused_with_the_way_to_json(tmp_path: Path) -> None:
    for zipped in (True, False):
        torch.save(TrainingArguments("out"), tmp_path / "training_args.bin", _use_new_zipfile_serialization=zipped)
        line = refusal(tmp_path / "training_args.bin")
        assert "is a pickle, which is not read, as that runs the code in it: write it as JSON" in line
        assert 'to_json_string())" training_args.bin > training_args.json' in line


@pytest.mark.parametrize(
    ("name", "content", "title"),
    [
        ("a.json", {"output_dir": "x", "learning_rate": 1e-5}, "HF Trainer"),
        ("a.json", {"output_dir": "x", "completion_only_loss": None, "packing": True}, "TRL's SFTTrainer"),
        ("a.json", {"peft_type": "LORA", "r": 8}, "PEFT's LoraConfig"),
        ("a.json", {"tuner_type": "lora", "model": "m", "learning_rate": 1e-4}, "ms-swift"),
        ("a.yml", {"base_model": "m", "adapter": "lora"}, "axolotl"),
        ("a.yaml", {"model_name_or_path": "m", "stage": "sft", "cutoff_len": 9}, "LLaMA-Factory"),
        ("a.yaml", {"model_name_or_path": "m", "use_peft": True}, "TRL's scripts"),
    ],
)
def test_the_program_is_told_by_its_settings(tmp_path: Path, name: str, content: dict[str, Any], title: str) -> None:
    (source,) = read_sources(write(tmp_path, name, json.dumps(content)))  # JSON is YAML
    assert (source.table.title, source.given) == (title, content)


def test_mappings_in_yaml_stay_mappings(tmp_path: Path) -> None:
    text = "base_model: m\nspecial_tokens:\n  pad_token: x\n  eos_token: y\nfsdp_config: {}\ndatasets:\n- path: a\n"
    (source,) = read_sources(write(tmp_path, "a.yaml", text))
    assert source.given["special_tokens"] == {"pad_token": "x", "eos_token": "y"}
    assert (source.given["fsdp_config"], source.given["datasets"]) == ({}, [{"path": "a"}])


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.json", "[1]", "holds a list"),
        ("a.json", "{", "is not valid JSON"),
        ("a.json", "[" * 100_000, "is not valid JSON"),
        ("a.json", "{}", "no setting by which its program is told"),
        ("a.json", '{"model_name_or_path": 1, "a": 1, "b": 2}', "does not have 2 of its 3 settings, such as a, b"),
        ("a.toml", "a = 1", "ends with '.toml'"),
        ("a.yaml", "base_model: a\nbase_model: b", "line 2: 'base_model' stands in line 1 already"),
        ("a.json", " " * 1_000_001, "is larger than 1,000,000 bytes"),
    ],
)  # fmt: skip
def test_other_files_are_refused(tmp_path: Path, name: str, text: str, words: str) -> None:
    line = refusal(write(tmp_path, name, text))
    assert str(tmp_path / name) in line
    assert words in line


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "no.json") == f"'{tmp_path / 'no.json'}' cannot be read: No such file or directory"
    assert "cannot be read: Is a directory" in refusal(tmp_path)
    (tmp_path / "a.json").write_bytes(b'{"a": "\xff"}')
    assert "is not UTF-8 (byte 7)" in refusal(tmp_path / "a.json")
