"""The commands on a text model: train, resume, evaluate and merge as for speech, padded and packed, without prepare."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from rawloop.components import build_family
from rawloop.config import parse
from rawloop.records import read_events, read_metrics

Door = Callable[..., Any]
Refusal = Callable[..., str]


@pytest.fixture
def config(text_checkpoint: Path, text_data: Path, tmp_path: Path) -> Path:
    """The config of a run of 2 steps on the tiny text model, into `tmp_path / "run"`."""
    settings = {
        "output": str(tmp_path / "run"),
        "device": "cpu",
        "model": {"path": str(text_checkpoint)},
        "adapter": {"rank": 4, "alpha": 8.0, "dropout": 0.1},
        "data": {split: str(text_data / f"{split}.jsonl") for split in ("train", "eval")},
        "train": {"batch_size": 2, "accumulation": 2, "max_steps": 2, "log_every": 1},
        "optim": {"lr": 1e-2},
        "evaluation": {"every": 1, "batch_size": 2},
        "checkpoint": {"save_every": 1},
        "records": {"progress": False},
        "checks": {"expect_chance": True},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return tmp_path / "run.yaml"


def numbers(run: Path, *keys: str) -> list[list[Any]]:
    return [[line[key] for line in read_metrics(run) if key in line] for key in keys]


@pytest.mark.parametrize("packing", ["false", "true"])
def test_a_run_is_resumed_evaluated_and_merged(door: Door, config: Path, tmp_path: Path, packing: str) -> None:
    run, cut = tmp_path / "run", tmp_path / "cut"
    options = ["--data.packing", packing]
    done = door("train", "--config", config, *options)
    assert done.code == 0, done.err
    assert not [event for event in read_events(run) if event["kind"] in ("skip", "warning", "fallback")]
    steps, losses = numbers(run, "step", "eval_loss")
    assert sorted(set(steps)) == [0, 1, 2]
    assert losses[2] < losses[0]
    # as if killed after the first step
    shutil.copytree(run, cut, symlinks=True)
    shutil.rmtree(cut / "checkpoints" / "step-00000002")
    for name in ("best", "best.json"):
        (cut / name).unlink()
    resumed = door("train", "--config", config, "--output", cut, "--resume", "latest", *options)
    assert resumed.code == 0, resumed.err
    assert "at step 1" in resumed.out
    keys = ("step", "loss", "loss/text", "grad_norm", "eval_loss", "eval_loss/text", "eval_targets/text")
    assert numbers(cut, *keys) == numbers(run, *keys)
    weights = [folder / "checkpoints/step-00000002/adapter/adapter_model.safetensors" for folder in (run, cut)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    evaluated = json.loads(door("evaluate", "--config", config, "--checkpoint", "latest", *options).out)
    assert evaluated["eval_loss"] == losses[2]
    assert door("merge", "--adapter", run / "best" / "adapter", "--output", tmp_path / "merged").code == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template


def test_a_run_of_an_older_version_is_resumed_with_its_sinks(door: Door, config: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert door("train", "--config", config, "--records.report_to", "[tensorboard]").code == 0
    run, older = tmp_path / "run", tmp_path / "older"
    shutil.copytree(run, older, symlinks=True)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["records"] = {"tensorboard": True, "wandb": False, "wandb_project": "rawloop", "progress": False}
    (older / "config.yaml").write_text(yaml.safe_dump(settings))
    more = ["--output", older, "--resume", "latest", "--train.max_steps", "3"]
    done = door("train", "--config", older / "config.yaml", *more)
    assert done.code == 0, done.err
    assert "records." not in done.out
    assert yaml.safe_load((older / "config.yaml").read_text())["records"]["report_to"] == ["tensorboard"]
    events = EventAccumulator(str(older / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    assert [scalar.step for scalar in events.Scalars("loss/text")] == [1, 2, 3]
    (first, last) = [text.tensor_proto.string_val[0].decode() for text in events.Tensors("config/text_summary")]
    assert "max_steps: 2" in first
    assert "max_steps: 3" in last


def test_a_missing_package_is_told_before_anything_is_read(
    door: Door, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rawloop.sinks.find_spec", lambda package: None)
    done = door("train", "--config", config, "--data.train", tmp_path / "none", "--records.report_to", "[mlflow]")
    assert done.code == 2
    assert "run `pip install 'rawloop[mlflow]'`, or take it out" in done.err
    assert not [*(tmp_path / "run").iterdir()]


@pytest.mark.parametrize("packing", ["false", "true"])
def test_the_family_is_told_to_pack(config: Path, packing: str) -> None:
    settings = parse(["--config", str(config), "--data.packing", packing], "test").config
    family: Any = build_family(settings)
    assert family.packing is (packing == "true")


def test_packed_and_padded_runs_learn_the_same(door: Door, config: Path, tmp_path: Path) -> None:
    options = ["--adapter.mode", "full", "--optim.lr", "1e-3"]
    for name, packing in (("padded", "false"), ("packed", "true")):
        folder = tmp_path / name
        assert door("train", "--config", config, "--output", folder, "--data.packing", packing, *options).code == 0
    keys = ("loss", "grad_norm", "eval_loss")
    for padded, packed in zip(*(numbers(tmp_path / name, *keys) for name in ("padded", "packed")), strict=True):
        assert packed == pytest.approx(padded, rel=1e-5)


def test_what_a_text_model_cannot_take_is_one_line(refusal: Refusal, config: Path, tmp_path: Path) -> None:
    assert "models of the family CausalLM need no codes: train without" in refusal("prepare", "--config", config)
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"id": "b", "text": "one<|im_end|>two"}\n')
    complaint = refusal("train", "--config", config, "--data.train", tmp_path / "bad.jsonl")
    reason = "sample 'b' (bad.jsonl line 2): its text contains the control token <|im_end|>: take it out"
    assert complaint == f"1 of 2 samples cannot be used: {reason}. Or leave them out: --data.on_bad_sample skip"


def test_unknown_keys_and_samples_of_both_sets_are_said_and_recorded(
    door: Door, config: Path, text_data: Path, tmp_path: Path
) -> None:
    records = [json.loads(line) for line in (text_data / "train.jsonl").read_text().splitlines()]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({**record, "mood": "glad"}) + "\n" for record in records))
    done = door("train", "--config", config, "--data.train", path, "--data.eval", path, "--train.max_steps", "1")
    assert done.code == 0, done.err
    lines = [
        f"{path}: keys that nothing reads: 'mood' {len(records)} times (data.strict: true refuses them)",
        f"data.eval: {len(records)} of its {len(records)} samples are also trained on: for these eval_loss "
        "does not measure unseen data; keep the two sets apart",
    ]
    warnings = [event["reason"] for event in read_events(tmp_path / "run") if event["kind"] == "warning"]
    assert warnings == [lines[0], lines[0], lines[1]]
    for line in lines:
        assert done.out.count(line) >= 1
        assert done.out.index(line) < done.out.index("trainable parameters")
    assert door("evaluate", "--config", config, "--data.eval", path).err.count(lines[0]) == 1
    done = door("train", "--config", config, "--data.train", path, "--output", tmp_path / "o", "--data.strict", "true")
    assert done.code == 2
    assert "line 1: 'mood' is no key of a record that is known, and data.strict is true" in done.err


def test_every_path_may_begin_with_the_home_folder(
    door: Door, config: Path, text_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    shutil.copytree(text_checkpoint, home / "model")
    settings = yaml.safe_load(config.read_text())
    for split, file in settings["data"].items():
        shutil.copy(file, home / f"{split}.jsonl")
        settings["data"][split] = f"~/{split}.jsonl"
    settings["model"]["path"], settings["output"], settings["train"]["max_steps"] = "~/model", "~/run", 1
    (home / "run.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setenv("HOME", str(home))
    asked = ["--config", home / "run.yaml"]
    slot = "~/run/checkpoints/step-00000001"
    for command in (
        ["train", *asked],
        ["train", *asked, "--resume", slot],
        ["evaluate", *asked, "--checkpoint", slot],
        ["verify", "~/run"],
        ["merge", "--adapter", f"{slot}/adapter", "--output", "~/merged", "--model.path", "~/model"],
        ["merge", "--adapter", f"{slot}/adapter", "--output", "~/again"],
        ["evaluate", *asked, "--model.path=~/merged"],
    ):
        done = door(*command)
        assert done.code == 0, (command, done.err)
    assert (home / "merged" / "config.json").is_file()
    assert str(home / "model") in (home / "run" / "config.yaml").read_text()
    nobody = door("evaluate", *asked, "--model.path", "~nobody_here/model")
    assert "model.path is '~nobody_here/model': no such folder" in nobody.err
    assert (
        "--checkpoint is '~nobody_here/x', which is" in door("evaluate", *asked, "--checkpoint", "~nobody_here/x").err
    )


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--evaluation.best_metric", "eval_los/text"],
            "which the evaluation does not measure (did you mean 'eval_los",
        ),
        (
            ["--evaluation.best_metric", "eval_loss/audio"],
            "it measures eval_loss, eval_loss/text, eval_targets/text, ev",
        ),
        (["--evaluation.best_metric", "eval_loss/text/x"], "and parts such as eval_loss/text/0"),
        (
            ["--optim.warmup_steps", "3"],
            "optim.warmup_steps is 3, and the run ends at step 2: the learning rate comes to",
        ),
        (
            ["--evaluation.every", "3"],
            "evaluation.every is 3, and the run ends at step 2: it is evaluated at step 0 and",
        ),
    ],
)
def test_what_cannot_come_to_pass_is_said_before_the_model_is_loaded(
    door: Door, config: Path, text_checkpoint: Path, tmp_path: Path, arguments: list[str], line: str
) -> None:
    model = Path(shutil.copytree(text_checkpoint, tmp_path / "model"))
    (model / "model.safetensors").write_bytes(b"")
    done = door("train", "--config", config, "--model.path", model, *arguments)
    assert done.code == 2
    assert line in done.out + done.err
    assert ("whose model.safetensors is empty" in done.err) == ("run ends at" in line)


def test_a_warm_up_of_half_of_the_run_is_no_word_worth(door: Door, config: Path) -> None:
    done = door("train", "--config", config, "--optim.warmup_steps", "1", "--evaluation.every", "2")
    assert done.code == 0, done.err
    assert "run ends at" not in done.out + done.err
