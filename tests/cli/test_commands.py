"""The commands on the demo: what train leaves behind, evaluate and merge read back, and a kill does not change."""

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoProcessor, HiggsAudioV2ForConditionalGeneration

from rawloop import trained as trained_model
from rawloop.checkpoint.slots import find_slots, verify
from rawloop.cli import main
from rawloop.families import ModelConfig, load_family
from rawloop.files import replace_file
from rawloop.loop import train
from rawloop.records import TIMES, read_events, read_metrics

Door = Callable[..., Any]
Ranks = Callable[..., list[Any]]
Write = Callable[..., Path]


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run, without those that measure time."""
    return [{key: value for key, value in line.items() if key not in TIMES} for line in read_metrics(run)]


def losses_of(run: Path) -> dict[int, float]:
    lines: list[dict[str, Any]] = metrics_of(run)
    return {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}


def weights_of(run: Path, step: int) -> dict[str, bytes]:
    """The bytes of all weights and optimizer states of a checkpoint."""
    slot = run / "checkpoints" / f"step-{step:08d}"
    return {str(path.relative_to(slot)): path.read_bytes() for path in sorted(slot.rglob("*.safetensors"))}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, write_config: Write) -> Path:
    """The folder of a finished run of 3 steps, `run`, and its config, `run.yaml`. Read it only."""
    folder = tmp_path_factory.mktemp("trained")
    assert main(["train", "--config", str(write_config(folder))]) == 0
    return folder


# -- train -------------------------------------------------------------------------------------------------------


def test_train_says_where_everything_is_and_how_the_loss_moved(door: Door, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = door("train", "--config", config)
    assert done.code == 0
    losses = losses_of(run)
    assert list(losses) == [0, 2, 3]
    assert losses[3] < losses[0]
    lines = done.out.splitlines()
    assert any(line.startswith("trainable parameters: ") for line in lines)
    assert any(line.startswith("precision: fp32 (") for line in lines)
    assert "trained 3 steps, 6 samples, 0 updates skipped" in lines
    assert any(line.startswith(f"eval_loss {losses[0]:.4f} at step 0 -> {losses[3]:.4f} at step 3 (") for line in lines)
    for place in ("best", "best/adapter", "checkpoints", "metrics.jsonl"):
        assert any(line.endswith(f" {run / place}") for line in lines), place
        assert (run / place).exists()
    assert [slot.name for slot in find_slots(run)] == ["step-00000003", "step-00000002", "step-00000000"]
    assert [line["step"] for line in metrics_of(run) if "loss" in line] == [1, 2, 3]
    assert {event["kind"] for event in read_events(run)} >= {"precision", "start", "save", "best"}


def test_a_train_without_a_terminal_says_a_line_per_log_step_and_evaluation(
    door: Door, config: Path, tmp_path: Path
) -> None:
    done = door("train", "--config", config, "--records.progress", "true")
    assert done.code == 0
    lines = [line for line in done.err.splitlines() if line.startswith("step ")]
    losses = losses_of(tmp_path / "run")
    trained = {line["step"]: line["loss"] for line in metrics_of(tmp_path / "run") if "loss" in line}
    wanted = [f"step 0/3  eval_loss {losses[0]:.4f}"]
    for step in (1, 2, 3):
        wanted.append(f"step {step}/3  loss {trained[step]:.4f}  ")
        wanted += [f"step {step}/3  eval_loss {losses[step]:.4f}"] if step in losses else []
    assert len(lines) == len(wanted)
    assert all(line.startswith(start) for line, start in zip(lines, wanted, strict=True)), lines


def test_the_config_in_the_run_folder_repeats_the_run(door: Door, trained: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert door("train", "--config", trained / "run" / "config.yaml", "--output", again).code == 0
    assert metrics_of(again) == metrics_of(trained / "run")
    assert weights_of(again, 3) == weights_of(trained / "run", 3)


def test_train_shows_its_checks_before_step_0(door: Door, config: Path, tmp_path: Path) -> None:
    done = door("train", "--config", config, "--checks.expect_chance", "false")
    assert done.code == 0
    order = ["label census of 8 samples", "first loss over 8 samples", "causality probe", "trained 3 steps"]
    places = [done.out.index(text) for text in order]
    assert places == sorted(places)
    assert "[warning] step 0: first loss of 'audio' is " in done.err
    assert json.loads((tmp_path / "run" / "census.json").read_text())["samples"] == 8
    run = tmp_path / "run"
    assert [event["check"] for event in read_events(run) if event["kind"] == "check"] == ["census", "loss", "causality"]
    assert (tmp_path / "run" / "best").exists()


@pytest.mark.parametrize("flag", [["--disable_eval"], ["--evaluation.enabled", "false"]])
def test_without_evaluation_the_training_is_the_same(
    door: Door, trained: Path, tmp_path: Path, flag: list[str]
) -> None:
    run = tmp_path / "run"
    done = door("train", "--config", trained / "run.yaml", "--output", run, "--data.eval", "null", *flag)
    assert done.code == 0
    assert not (run / "best").exists()
    assert f"adapter:     {run}/checkpoints/step-00000003/adapter" in done.out
    assert metrics_of(run) == [line for line in metrics_of(trained / "run") if "loss" in line]
    assert weights_of(run, 3) == weights_of(trained / "run", 3)


def test_a_packed_run_learns_the_same(door: Door, trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert door("train", "--config", trained / "run.yaml", "--output", run, "--data.packing", "true").code == 0
    for packed, padded in zip(metrics_of(run), metrics_of(trained / "run"), strict=True):
        for key in {"loss", "loss/audio", "grad_norm", "eval_loss"} & set(padded):
            assert packed[key] == pytest.approx(padded[key], rel=1e-5), key


def test_a_run_in_full_stores_a_model(door: Door, config: Path, tmp_path: Path) -> None:
    done = door("train", "--config", config, "--adapter.mode", "full", "--train.max_steps", "1")
    assert done.code == 0
    model = tmp_path / "run" / "checkpoints" / "step-00000001" / "model"
    _, info = HiggsAudioV2ForConditionalGeneration.from_pretrained(model, use_text_head=True, output_loading_info=True)
    assert not info["missing_keys"]
    evaluated = json.loads(door("evaluate", "--config", config, "--adapter.mode", "full", "--checkpoint", "latest").out)
    assert evaluated["eval_loss"] == losses_of(tmp_path / "run")[1]


def test_unshuffled_training_begins_with_the_first_samples(
    door: Door, config: Path, tmp_path: Path, demo_data: Path
) -> None:
    first = tmp_path / "first"
    shutil.copytree(demo_data / "train", first)
    samples = json.loads((first / "metadata.json").read_text())["samples"]
    (first / "metadata.json").write_text(json.dumps({"samples": samples[:2]}))
    done = door("train", "--config", config, "--data.eval", first, "--data.shuffle", "false", "--train.max_steps", "1")
    assert done.code == 0
    before, loss = (line for line in metrics_of(tmp_path / "run") if line["step"] == 0 or "loss" in line)
    assert math.isclose(before["eval_loss"], loss["loss"], rel_tol=1e-6)


# -- evaluate ----------------------------------------------------------------------------------------------------


def test_evaluate_gives_the_losses_that_the_run_recorded(door: Door, trained: Path) -> None:
    recorded, slots = losses_of(trained / "run"), trained / "run" / "checkpoints"
    before = sorted(path for path in (trained / "run").rglob("*"))

    def evaluate(checkpoint: Path | None, step: int | None, *arguments: str | Path) -> float:
        done = door("evaluate", "--config", trained / "run.yaml", *arguments)
        assert done.code == 0, done
        found = json.loads(done.out)  # nothing else is printed
        assert list(found)[:3] == ["checkpoint", "step", "eval_loss"]
        assert (found["checkpoint"], found["step"]) == (checkpoint and str(checkpoint), step)
        what = f"{checkpoint} (step {step})" if checkpoint else "the base model: no --checkpoint is given"
        assert f"rawloop evaluate: evaluating {what}" in done.err.splitlines()
        value: float = found["eval_loss"]
        return value

    best = trained / "run" / "checkpoints" / "step-00000003"
    assert evaluate(None, None) == recorded[0]
    assert evaluate(slots / "step-00000003", 3, "--checkpoint", "latest") == recorded[3]
    assert evaluate(best, 3, "--checkpoint", "best") == min(recorded.values())
    assert evaluate(slots / "step-00000002", 2, "--checkpoint", slots / "step-00000002") == recorded[2]
    small = evaluate(best, 3, "--checkpoint", "best", "--evaluation.batch_size", "1")
    assert math.isclose(small, recorded[3], rel_tol=1e-6)
    assert sorted(path for path in (trained / "run").rglob("*")) == before


def test_evaluate_in_another_mode_says_how_to_evaluate(door: Door, trained: Path) -> None:
    again = ("evaluate", "--config", trained / "run.yaml", "--checkpoint", "best")
    done = door(*again, "--precision.mode", "bf16")
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines()[-1] == (
        "rawloop evaluate: the checkpoint was trained with precision.mode 'fp32', this evaluation has 'bf16': pass "
        "--precision.mode fp32"
    )
    assert door(*again, "--precision.mode", "fp32").code == 0


def test_evaluate_on_two_ranks_gives_the_same(ranks: Ranks, trained: Path) -> None:
    first, second = ranks("evaluate", "--config", trained / "run.yaml", "--checkpoint", "best")
    assert (first.code, second.code, second.out) == (0, 0, ""), (first, second)
    assert "rawloop evaluate: evaluating " in first.err
    assert "rawloop evaluate: " not in second.err
    assert math.isclose(json.loads(first.out)["eval_loss"], losses_of(trained / "run")[3], rel_tol=1e-6)


def test_evaluate_refuses_ranks_with_different_checkpoints(ranks: Ranks, trained: Path) -> None:
    other = ("--checkpoint", trained / "run" / "checkpoints" / "step-00000002")
    done = ranks("evaluate", "--config", trained / "run.yaml", "--checkpoint", "best", last=other)
    assert [(rank.code, rank.out) for rank in done] == [(2, "")] * 2
    assert "the ranks differ: rank 1 has the checkpoint step 2, digest " in done[0].err


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_run_that_was_copied_is_told_from_the_one_that_its_config_names(
    ranks: Ranks, trained: Path, tmp_path: Path, command: str
) -> None:
    old, copied = tmp_path / "old", tmp_path / "copied"
    for folder in (old, copied):
        shutil.copytree(trained / "run", folder, symlinks=True)
        config = (folder / "config.yaml").read_text().replace(f"output: {trained / 'run'}", f"output: {old}")
        (folder / "config.yaml").write_text(config)
    again = ["--resume", "latest", "--train.batch_size", "1"]
    more = again if command == "train" else ["--checkpoint", "best"]
    first, second = ranks(command, copied / "config.yaml", *more)
    assert (first.code, second.code) == (0, 0), (first, second)
    line = f"rawloop {command}: the config is a run's own, in {copied}, and its output is {old}: pass "
    assert f"{line}--output {copied} to work there" in first.err.splitlines()
    assert line not in second.err


def test_evaluate_verifies_what_it_loads(door: Door, trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run, symlinks=True)
    weights = run / "checkpoints" / "step-00000003" / "adapter" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    done = door("evaluate", "--config", trained / "run.yaml", "--output", run, "--checkpoint", weights.parent.parent)
    assert done.code == 1
    assert "adapter_model.safetensors" in done.err.splitlines()[-1]
    done = door("evaluate", "--config", trained / "run.yaml", "--output", run, "--checkpoint", "latest")
    assert done.code == 0
    assert "skipped a damaged checkpoint: " in done.err
    assert json.loads(done.out)["eval_loss"] == losses_of(run)[2]


def test_evaluate_tells_damage_from_a_mistake(door: Door, trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run, symlinks=True)
    (run / "best" / "MANIFEST.json").unlink()
    for checkpoint, code, said in (
        ("best", 1, "there is no MANIFEST.json: the checkpoint was never completed"),
        (str(run / "best"), 1, "there is no MANIFEST.json: the checkpoint was never completed"),
        (str(run), 2, "is no checkpoint's folder"),
    ):
        done = door("evaluate", "--config", trained / "run.yaml", "--output", run, "--checkpoint", checkpoint)
        assert done.code == code
        assert said in done.err.splitlines()[-1]


# -- merge -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def logits(model: nn.Module, family: Any) -> Tensor:
    return torch.cat([rows.flatten() for rows in family.logits(model.eval(), family.probe()).values()])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_merge_writes_a_model_that_plain_transformers_loads(
    door: Door, trained: Path, tmp_path: Path, demo_checkpoint: Path
) -> None:
    adapter, merged = trained / "run" / "best" / "adapter", tmp_path / "out" / "merged"
    done = door("merge", "--adapter", adapter, "--output", merged)
    assert done.code == 0, done
    assert "(bound 1e-04)" in done.out
    family = load_family(ModelConfig(path=str(merged)))
    model: Any = HiggsAudioV2ForConditionalGeneration.from_pretrained(merged, use_text_head=True)
    base: Any = HiggsAudioV2ForConditionalGeneration.from_pretrained(demo_checkpoint / "model", use_text_head=True)
    wanted = logits(PeftModel.from_pretrained(base, adapter), family)
    assert (logits(model, family) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert AutoProcessor.from_pretrained(merged).tokenizer.chat_template
    assert {path.name for path in (demo_checkpoint / "model").glob("*.json*")} <= {p.name for p in merged.iterdir()}
    again = door("merge", "--adapter", adapter, "--output", merged)
    assert (again.code, again.out) == (2, "")
    half = door("merge", "--adapter", adapter, "--output", tmp_path / "half", "--dtype", "bfloat16")
    assert half.code == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half", "out"]


def test_merge_writes_nothing_when_the_logits_differ(
    door: Door, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trained_model, "BOUND", 0.0)  # no float32 arithmetic is that exact
    done = door("merge", "--adapter", trained / "run" / "best" / "adapter", "--output", tmp_path / "merged")
    assert done.code == 1
    assert "more than 0e+00: nothing was written" in done.err
    assert list(tmp_path.iterdir()) == []


def test_merge_does_not_take_a_damaged_checkpoint(door: Door, trained: Path, tmp_path: Path) -> None:
    slot = tmp_path / "best"
    shutil.copytree(trained / "run" / "best", slot)
    weights = slot / "adapter" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3000] ^= 4
    weights.write_bytes(content)
    done = door("merge", "--adapter", slot / "adapter", "--output", tmp_path / "merged")
    assert done.code == 1
    assert "adapter/adapter_model.safetensors has changed since it was written" in done.err
    assert not (tmp_path / "merged").exists()
    (slot / "MANIFEST.json").unlink()
    (slot / "adapter" / "adapter_config.json").write_text('{"peft_type": ')
    done = door("merge", "--adapter", slot / "adapter", "--output", tmp_path / "merged")
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "adapter_config.json cannot be read" in done.err


# -- prepare -----------------------------------------------------------------------------------------------------


def test_prepare_encodes_once(door: Door, trained: Path, tmp_path: Path) -> None:
    arguments = ("prepare", "--config", trained / "run.yaml", "--data.codes", tmp_path / "codes")
    first, second = door(*arguments), door(*arguments)
    assert (first.code, second.code) == (0, 0)
    clips = int(first.out.split()[2])
    said = f"codes of {clips} clips in {tmp_path}/codes: {clips} encoded now, 0 already there, 0 left out; "
    assert re.fullmatch(re.escape(said) + r"0\.\d+ h of audio at [\d.]+ h a minute\n", first.out), first.out
    assert (
        second.out == f"codes of {clips} clips in {tmp_path}/codes: 0 encoded now, {clips} already there, 0 left out\n"
    )


def test_a_bad_clip_that_was_skipped_is_left_out_of_the_training(
    door: Door, config: Path, tmp_path: Path, demo_data: Path
) -> None:
    data = tmp_path / "train"
    shutil.copytree(demo_data / "train", data)
    samples = json.loads((data / "metadata.json").read_text())["samples"]
    (data / samples[1]["audio_file"]).write_text("no audio")
    needing = [
        sample["id"]
        for sample in samples
        if samples[1]["audio_file"] in (sample["audio_file"], sample.get("ref_audio_file"))
    ]
    arguments = ("--config", config, "--data.train", data, "--data.codes", tmp_path / "codes")
    skipped = door("prepare", *arguments, "--data.on_bad_sample", "skip")
    assert skipped.code == 0
    assert samples[1]["audio_file"] in skipped.err
    left = len(samples) - len(needing)
    done = door("train", *arguments, "--train.epochs", "1", "--train.max_steps", "0", "--train.batch_size", "1")
    assert done.code == 0, done
    assert (
        f"data.train: {len(needing)} of {len(samples)} samples left out, since data.on_bad_sample is skip" in done.out
    )
    assert f"trained {left} steps, {left} samples, 0 updates skipped" in done.out


# -- kills and resumes -------------------------------------------------------------------------------------------

LONG = {"train": {"max_steps": 10}, "adapter": {"dropout": 0.2}, "checkpoint": {"save_every": 3, "keep_last": 0}}


def kill_after(slot: Path) -> Callable[[list[int]], None]:
    """Give a function that kills processes as soon as a checkpoint is there."""

    def kill(children: list[int]) -> None:
        deadline = time.monotonic() + 60
        while not slot.exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        for child in children:
            os.kill(child, signal.SIGKILL)

    return kill


def assert_same_run(killed: Path, whole: Path, last: int) -> None:
    assert metrics_of(killed) == metrics_of(whole)
    assert weights_of(killed, last) == weights_of(whole, last)
    assert {event["kind"] for event in read_events(killed)} >= {"restore"}
    for slot in find_slots(killed):
        verify(slot)


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    ranks: Ranks, write_config: Write, tmp_path: Path, size: int
) -> None:
    config = write_config(tmp_path, **LONG)
    killed, whole = tmp_path / "run", tmp_path / "whole"
    assert {done.code for done in ranks("train", "--config", config, "--output", whole, size=size)} == {0}
    then = kill_after(killed / "checkpoints" / "step-00000003")
    codes = {done.code for done in ranks("train", "--config", config, size=size, then=then)}
    assert codes == {-signal.SIGKILL}
    assert not (killed / "checkpoints" / "step-00000010").exists()
    resumed = ranks("train", "--config", config, "--resume", "latest", size=size)
    assert {done.code for done in resumed} == {0}, resumed
    assert "resumed from " in resumed[0].out
    assert_same_run(killed, whole, 10)


def stop_after(path: Path, number: signal.Signals) -> Callable[[list[int]], None]:
    """Give a function that signals processes as soon as a file or folder is there."""

    def stop(children: list[int]) -> None:
        deadline = time.monotonic() + 60
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        for child in children:
            os.kill(child, number)

    return stop


def test_a_train_that_is_told_to_stop_ends_with_75_and_a_line(
    ranks: Ranks, write_config: Write, tmp_path: Path
) -> None:
    config = write_config(tmp_path, train={"max_steps": 200}, checkpoint={"save_every": 3})
    then = stop_after(tmp_path / "run" / "checkpoints" / "step-00000003", signal.SIGUSR1)
    (done,) = ranks("train", "--config", config, size=1, then=then)
    assert done.code == 75, done
    line = done.err.splitlines()[-1]
    found = re.fullmatch(
        r"rawloop train: stopped by SIGUSR1 at step (\d+); checkpoint: (.*); continue from it .*", line
    )
    assert found, line
    assert find_slots(tmp_path / "run")[0] == Path(found[2])
    assert int(found[1]) == int(found[2][-8:])


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ctrl_c_saves_and_ends_with_130_and_nothing_is_lost(
    ranks: Ranks, write_config: Write, tmp_path: Path, size: int
) -> None:
    config = write_config(tmp_path, **LONG, data={"num_workers": 1})
    stopped, whole = tmp_path / "run", tmp_path / "whole"
    assert {done.code for done in ranks("train", "--config", config, "--output", whole, size=size)} == {0}
    then = stop_after(stopped / "checkpoints" / "step-00000003", signal.SIGINT)
    results = ranks("train", "--config", config, size=size, then=then)
    assert [done.code for done in results] == [130] * size
    last = results[0].err.splitlines()[-1]
    said = "Ctrl-C: the run saves its state after this step and ends; press Ctrl-C again to end at once"
    assert f"rawloop train: {said}" in results[0].err  # the signal may come while another line is printed
    rank = "" if size == 1 else "(?: on rank [01])?"  # unless both had it
    line = rf"rawloop train: stopped by Ctrl-C{rank} at step (\d+); checkpoint: (.*); continue from it .*"
    found = re.fullmatch(line, last)
    assert found, last
    assert find_slots(stopped)[0] == Path(found[2])
    assert 3 <= int(found[1]) < 10
    assert {done.code for done in ranks("train", "--config", config, "--resume", "auto", size=size)} == {0}
    assert_same_run(stopped, whole, 10)


SLOW_STEPS = """
import time
from pathlib import Path
from rawloop.families.higgs_audio_v2 import HiggsAudioV2

class Slow(HiggsAudioV2):
    def losses(self, model, batch):
        found = super().losses(model, batch)
        if model.training and Path("slow").exists():
            Path("waits").touch()
            time.sleep(600)
        return found
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["one process", "torchrun", "script"])
def test_a_second_ctrl_c_ends_at_once(config: Path, tmp_path: Path, how: str) -> None:
    root = Path(__file__).parents[2]
    (tmp_path / "slow_family.py").write_text(SLOW_STEPS)
    options = ["--model.family", "slow_family:Slow", "--checks.enabled", "false", "--disable_eval"]
    options += ["--train.max_steps", "2000", "--checkpoint.save_every", "2"]
    train = ["-m", "rawloop", "train", "--config", str(config), *options]
    command = {
        "one process": [sys.executable, *train],
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *train],
        "script": ["bash", str(root / "launch" / "single_node.sh"), str(config), *options],
    }[how]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{root}", "NPROC": "2", "PYTHON": sys.executable}
    with subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        for awaited in (tmp_path / "run" / "checkpoints" / "step-00000002", tmp_path / "waits"):
            deadline = time.monotonic() + 200
            while not awaited.exists() and time.monotonic() < deadline:
                time.sleep(0.02)
            (tmp_path / "slow").touch()  # only now, after the passes before step 0
        assert process.stderr is not None
        process.send_signal(signal.SIGINT)
        lines: list[str] = []
        while not lines or "press Ctrl-C again" not in lines[-1]:
            lines.append(process.stderr.readline())
            assert lines[-1], lines
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        pressed = time.monotonic()
        rest = process.communicate(timeout=100)[1]
    assert time.monotonic() - pressed < 60  # the step takes 600
    assert "rawloop train: interrupted; what was saved is whole: continue with --resume auto" in rest
    assert process.returncode == (1 if how == "torchrun" else 130)


def test_a_stop_that_cannot_be_noted_ends_with_75_and_says_so(
    door: Door, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        if path.name == ".launch" and "stopped" in text:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace_file(path, text)

    def stopped(run: Any) -> None:
        (tmp_path / "run" / "STOP").touch()
        train(run)

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "4711")
    monkeypatch.setattr("rawloop.checkpoint.run_folder.replace_file", full)
    monkeypatch.setattr("rawloop.cli.train.train", stopped)
    done = door("train", "--config", config, "--output", tmp_path / "run")
    assert done.code == 75
    *_, noted, last = done.err.splitlines()
    assert "the stop could not be marked ([Errno 28] No space left on device)" in noted
    assert "continue from it with --resume latest" in last


@pytest.mark.parametrize(
    ("command", "how"),
    [("train", ": continue with --resume auto"), ("prepare", ": run it again to continue"), ("evaluate", "")],
)
def test_an_interrupted_command_says_how_to_go_on(
    door: Door, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, how: str
) -> None:
    (tmp_path / "interrupting_family.py").write_text("def make(config):\n    raise KeyboardInterrupt\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    done = door(command, "--config", config, "--model.family", "interrupting_family:make")
    assert done.code == 130
    assert done.err.splitlines()[-1] == f"rawloop {command}: interrupted; what was saved is whole{how}"


def test_the_exit_code_is_written_down_by_the_first_process_of_a_machine(
    door: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAWLOOP_EXIT_CODE_FILE", str(tmp_path / "code"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert door("train", "--config", tmp_path / "none.yaml").code == 2
    assert not (tmp_path / "code").exists()
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert door("train", "--config", tmp_path / "none.yaml").code == 2
    assert (tmp_path / "code").read_text() == "2"


def test_a_prepare_that_is_told_to_stop_ends_with_75_and_keeps_what_it_has(
    ranks: Ranks, door: Door, trained: Path, tmp_path: Path
) -> None:
    arguments = ("prepare", "--config", trained / "run.yaml", "--data.codes", tmp_path / "codes")
    (done,) = ranks(*arguments, size=1, then=stop_after(tmp_path / "codes", signal.SIGTERM))
    assert done.code == 75, done
    assert done.err.splitlines()[-1] == (
        "rawloop prepare: stopped by SIGTERM; encoded clips are kept: run `rawloop prepare` again to go on"
    )
    again = door(*arguments)
    assert again.code == 0
    encoded, reused = (int(number) for number in re.findall(r"(\d+) (?:encoded now|already there)", again.out))
    clips = int(again.out.split()[2])
    assert (encoded + reused, reused < clips) == (clips, True)


def test_a_finished_run_can_be_resumed_without_harm(door: Door, trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run, symlinks=True)
    done = door("train", "--config", trained / "run.yaml", "--output", run, "--resume", "latest")
    assert done.code == 0, done
    assert "trained 3 steps, 6 samples, 0 updates skipped" in done.out
    assert metrics_of(run) == metrics_of(trained / "run")
    assert [slot.name for slot in find_slots(run)] == [slot.name for slot in find_slots(trained / "run")]
    for step in (2, 3):
        assert weights_of(run, step) == weights_of(trained / "run", step)
    assert json.loads((run / "best.json").read_text()) == json.loads((trained / "run" / "best.json").read_text())


def test_a_finished_run_can_be_made_longer(door: Door, write_config: Write, tmp_path: Path) -> None:
    config = write_config(tmp_path, optim={"schedule": "constant"})
    whole = ["train", "--config", config, "--output", tmp_path / "whole", "--train.max_steps", "5"]
    assert door(*whole).code == 0
    assert door("train", "--config", config).code == 0
    assert door("train", "--config", config, "--resume", "latest", "--train.max_steps", "5").code == 0
    run = tmp_path / "run"
    assert weights_of(run, 5) == weights_of(tmp_path / "whole", 5)
    shared = [
        line for line in metrics_of(run) if line["step"] != 3 or "loss" in line
    ]  # step 3 was evaluated as the end
    assert shared == [line for line in metrics_of(tmp_path / "whole") if line["step"] != 3 or "loss" in line]


def unchanged(folder: Path) -> dict[str, tuple[bytes, int]]:
    """What must be left as it was; an event may say what was tried, and the lock who did."""
    kept = {"events.jsonl", ".lock"}
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in kept)
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_settings_that_make_another_run_cannot_resume(door: Door, trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run, symlinks=True)
    before = unchanged(run)
    again = ("train", "--config", trained / "run.yaml", "--output", run, "--resume", "latest")
    for arguments, problem in (
        ("--precision.mode bf16", "resume with --precision.mode fp32"),
        (
            "--adapter.rank 8 --optim.lr 1",
            "adapter.rank 4 -> 8: set them back, or start another run from these weights with --init_from CHECKPOINT",
        ),
        (
            "--seed 1 --data.max_seconds 20 --adapter.alpha 16 --model.stream_weights {text: 0.5}",
            'seed 0 -> 1, model.stream_weights {} -> {"text": 0.5}, adapter.alpha 8.0 -> 16.0, data.max_seconds 30.0 '
            "-> 20.0: set them back, or start another run",
        ),
        ("--evaluation.best_mode max", "evaluation.best_mode min -> max: "),
        ("--train.batch_size 1", "run took 2 samples (1 process(es) x train.batch_size 2 x train.accumulation 1), and"),
    ):
        words = arguments.replace("{text: 0.5}", "{text:~0.5}").split()
        done = door(*again, *(word.replace("~", " ") for word in words))
        assert done.code == 2
        assert problem in done.err.splitlines()[-1], done.err
        assert unchanged(run) == before


def test_what_may_change_is_taken_and_said(door: Door, trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run, symlinks=True)
    new = "--optim.lr 1e-4 --train.max_steps 4 --train.batch_size 1 --train.accumulation 2 --evaluation.every 4"
    done = door("train", "--config", trained / "run.yaml", "--output", run, "--resume", "latest", *new.split())
    assert done.code == 0, done.err
    expected = [
        "train.batch_size 2 -> 1",
        "train.accumulation 1 -> 2",
        "train.max_steps 3 -> 4",
        "optim.lr 0.003 -> 0.0001",
        "evaluation.every 2 -> 4",
    ]
    printed = done.out.splitlines()
    place = printed.index(expected[0])
    assert printed[place : place + 5] == expected
    (event,) = [event for event in read_events(run) if event["kind"] == "restore" and "changes" in event]
    assert (event["step"], event["changes"]) == (3, expected)
    stored = json.loads((run / "checkpoints" / "step-00000004" / "state" / "config.json").read_text())
    assert (stored["config"]["optim"]["lr"], stored["world_size"]) == (1e-4, 1)
    assert metrics_of(run)[: len(metrics_of(trained / "run"))] == metrics_of(trained / "run")


def test_texts_that_have_changed_are_other_data(door: Door, trained: Path, tmp_path: Path, demo_data: Path) -> None:
    run, changed = tmp_path / "run", tmp_path / "changed"
    shutil.copytree(trained / "run", run, symlinks=True)
    shutil.copytree(demo_data / "train", changed)
    metadata = json.loads((changed / "metadata.json").read_text())
    again = ["train", "--config", trained / "run.yaml", "--output", run, "--resume", "latest", "--train.max_steps", "4"]
    again += ["--data.train", changed]
    metadata["samples"][0].pop("transcript_file")
    metadata["samples"][0]["transcript"] = "Something else."
    (changed / "metadata.json").write_text(json.dumps(metadata))
    refused = door(*again)
    assert refused.code == 2
    digests = "8 samples, digest [0-9a-f]{16}"
    assert re.search(rf"was trained on other samples \({digests} then, {digests} in data.train now", refused.err)


def test_a_resume_passes_over_damaged_settings(door: Door, trained: Path, tmp_path: Path) -> None:
    """A flipped bit in what is compared first must not refuse the settings of a sound, older checkpoint."""
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run, symlinks=True)
    stored = run / "checkpoints" / "step-00000003" / "state" / "config.json"
    stored.write_text(stored.read_text().replace('"seed": 0', '"seed": 8'))
    done = door("train", "--config", trained / "run.yaml", "--output", run, "--resume", "latest")
    assert done.code == 0, done.err
    assert "step-00000002 at step 2" in done.out
    assert weights_of(run, 3) == weights_of(trained / "run", 3)


@pytest.mark.slow
def test_two_processes_under_torchrun_killed_and_resumed(write_config: Write, tmp_path: Path) -> None:
    config = write_config(tmp_path, **LONG)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, "-m", "rawloop", "train", "--config", str(config)]
    subprocess.run([*command, "--output", str(tmp_path / "whole")], timeout=110, check=True)
    started = psutil.Popen(command)
    kill_after(tmp_path / "run" / "checkpoints" / "step-00000003")([])
    for process in [started, *started.children(recursive=True)]:
        process.kill()
    assert started.wait(timeout=240) == -signal.SIGKILL
    subprocess.run([*command, "--resume", "latest"], timeout=110, check=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole", 10)


@pytest.mark.slow
def test_the_whole_way_in_processes_of_its_own(trained: Path, tmp_path: Path) -> None:
    """What `door` and `ranks` run must be what `python -m rawloop` runs."""
    command = [sys.executable, "-m", "rawloop", "train", "--config", str(trained / "run.yaml")]
    subprocess.run([*command, "--output", str(tmp_path / "run")], timeout=240, check=True)
    assert metrics_of(tmp_path / "run") == metrics_of(trained / "run")
    assert weights_of(tmp_path / "run", 3) == weights_of(trained / "run", 3)


BROKEN = """
import os
from rawloop.families.higgs_audio_v2 import HiggsAudioV2

class Broken(HiggsAudioV2):
    calls = 0

    def losses(self, model, batch):
        self.calls += model.training
        if os.environ["RANK"] == "1" and self.calls == 3:
            raise RuntimeError("a bug in the forward pass")
        return super().losses(model, batch)
"""


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others_and_has_the_first_word(config: Path, tmp_path: Path) -> None:
    (tmp_path / "broken_family.py").write_text(BROKEN)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    more = ["--model.family", "broken_family:Broken", "--train.max_steps", "6", "--disable_eval"]
    more += ["--checks.enabled", "false"]  # the third pass is then the second step's, in DDP
    command = [*torchrun, "-m", "rawloop", "train", "--config", str(config), *more]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    started = time.monotonic()
    done = subprocess.run(command, env=environment, timeout=100, capture_output=True, text=True, check=False)
    assert time.monotonic() - started < 60  # of which the start takes most
    assert done.returncode == 1
    cause = done.stderr.index("RuntimeError: a bug in the forward pass")
    assert "[rank0]: Traceback" not in done.stderr
    said = done.stderr.find("rawloop train: another rank has ended, and its message says why")  # if it had the time
    assert said == -1 or cause < said
