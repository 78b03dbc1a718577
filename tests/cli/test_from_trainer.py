"""`rawloop from-trainer`: settings that HF Trainer and PEFT wrote become a config, and the config trains."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import LoraConfig
from transformers import TrainingArguments

from rawloop.config import parse
from rawloop.records import read_metrics

Door = Callable[..., Any]


@pytest.fixture
def written(tmp_path: Path) -> list[Path]:
    """The files that HF Trainer and PEFT write: training_args.json and adapter_config.json."""
    arguments = TrainingArguments(
        str(tmp_path / "run"),
        per_device_train_batch_size=2,
        max_steps=2,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.5,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=2,
        logging_steps=1,
        load_best_model_at_end=True,
        use_cpu=True,
        metric_for_best_model="eval_loss",
    )
    LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM").save_pretrained(
        tmp_path
    )
    (tmp_path / "training_args.json").write_text(arguments.to_json_string(), encoding="utf-8")
    return [tmp_path / "training_args.json", tmp_path / "adapter_config.json"]


def test_what_hf_trainer_wrote_becomes_a_config_that_trains(
    door: Door, written: list[Path], text_checkpoint: Path, text_data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "my.yaml"
    done = door("from-trainer", *written, "--output", output)
    assert (done.code, done.err) == (0, "")
    config = parse(["--config", str(output)], "rawloop train")[0]
    assert (config.train.batch_size, config.train.max_steps, config.train.log_every) == (2, 2, 1)
    assert (config.optim.lr, config.optim.schedule, config.optim.warmup_ratio) == (1e-3, "cosine", 0.5)
    assert (config.evaluation.enabled, config.evaluation.every, config.checkpoint.save_every) == (True, 1, 2)
    assert (config.checkpoint.keep_last, config.seed, config.device, config.evaluation.batch_size) == (0, 42, "cpu", 8)
    assert (config.adapter.mode, config.adapter.rank, config.adapter.alpha) == ("lora", 4, 8.0)
    assert sorted(config.adapter.target_modules) == ["down_proj", "q_proj"]
    assert done.out.endswith(
        "still to be set: model.path, data.train, data.eval (or data.eval_share, or evaluation.enabled false)\n"
        f"wrote {output}: rawloop train --config {output}\n"
    )
    model = ["--model.path", text_checkpoint, "--records.progress", "false"]
    data = [word for split in ("train", "eval") for word in (f"--data.{split}", text_data / f"{split}.jsonl")]
    trained = door("train", "--config", output, *model, *data)
    assert trained.code == 0, trained.err
    assert [line["step"] for line in read_metrics(tmp_path / "run") if "eval_loss" in line] == [0, 1, 2]
    assert (tmp_path / "run" / "best" / "adapter" / "adapter_config.json").is_file()


def test_no_field_is_left_without_a_line(door: Door, written: list[Path], tmp_path: Path) -> None:
    out = door("from-trainer", *written, "--output", tmp_path / "my.yaml").out
    assert "not known" not in out
    defaults = [line for line in out.splitlines() if line.startswith("  ") and ", " in line and "->" not in line]
    names = {name for line in defaults for name in line.strip().split(", ")}
    names |= {line.split()[0].rstrip(":") for line in out.splitlines() if line.startswith("  ")}
    for file in written:
        assert not json.loads(file.read_text()).keys() - names


def test_a_python_file_without_lora_is_full_fine_tuning(door: Door, tmp_path: Path) -> None:
    script = (
        "from transformers import TrainingArguments\nimport sys\nTrainingArguments('out', seed=sys.argv[1], fp16=True)"
    )
    (tmp_path / "train.py").write_text(script, encoding="utf-8")
    done = door("from-trainer", tmp_path / "train.py", "--output", tmp_path / "my.yaml")
    settings = yaml.safe_load((tmp_path / "my.yaml").read_text())
    assert (settings["adapter"], settings["precision"], "seed" in settings) == (
        {"mode": "full"},
        {"mode": "amp_fp16"},
        False,
    )
    assert "adapter.mode: full (the file has no call of LoraConfig: all weights are trained)" in done.out
    assert "not read, so rawloop's default stands:\n  seed sys.argv[1] (line 3) -> seed" in done.out


def test_one_file_alone_says_what_it_lacks(door: Door, written: list[Path], tmp_path: Path) -> None:
    out = door("from-trainer", written[0], "--output", tmp_path / "my.yaml").out
    assert "adapter.mode (lora, the default, or full: the file does not say which)" in out
    assert door("from-trainer", written[1], "--output", tmp_path / "lora.yaml").code == 0
    assert yaml.safe_load((tmp_path / "lora.yaml").read_text()).keys() == {"adapter"}


def test_an_output_is_replaced_only_by_force(
    door: Door, refusal: Callable[..., str], written: list[Path], tmp_path: Path
) -> None:
    output = tmp_path / "my.yaml"
    output.write_text("mine")
    line = refusal("from-trainer", *written, "--output", output)
    assert line == f"--output is '{output}', which exists: choose another name, or replace it with --force"
    assert output.read_text() == "mine"
    assert door("from-trainer", *written, "--output", output, "--force").code == 0
    assert output.read_text().startswith(f"# written by `rawloop from-trainer` from {written[0]} (HF Trainer), ")
    assert {path.name for path in tmp_path.iterdir()} == {*(file.name for file in written), "my.yaml"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"base_model": "m", "rl": "dpo"}, "rl is 'dpo': rawloop trains on given answers, by cross-entropy"),
        ({"base_model": "m", "learning_rate": "fast"}, "learning_rate is 'fast': it must be a number (a.yaml"),
        ({"base_model": "m", "learning_rate": -1}, "must be a number above 0 (optim.lr from a.yaml (axolotl))"),
        ({"base_model": "m", "val_set_size": 0.1, "test_datasets": ["a.jsonl"]}, "set one of them"),
        ({"base_model": 5}, "model.path is '5'"),
    ],
)  # fmt: skip
def test_settings_that_rawloop_refuses_write_nothing(
    refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: dict[str, Any], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    assert words in refusal("from-trainer", "a.yaml", "--output", "my.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["a.yaml"]


def test_two_files_that_contradict_each_other_are_refused(refusal: Callable[..., str], tmp_path: Path) -> None:
    for name, rate in (("a", 1e-4), ("b", 2e-4)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"output_dir": "x", "learning_rate": rate}), encoding="utf-8")
    line = refusal("from-trainer", tmp_path / "a.json", tmp_path / "b.json", "--output", tmp_path / "my.yaml")
    assert line.startswith("'optim.lr' is 0.0001 by ")
    assert "and 0.0002 by " in line


def test_an_output_that_cannot_be_written_is_told(
    refusal: Callable[..., str], written: list[Path], tmp_path: Path
) -> None:
    line = refusal("from-trainer", *written, "--output", tmp_path / "no" / "my.yaml")
    assert "which cannot be written" in line
