"""`init_from`: what is taken of a checkpoint, that nothing is rounded on the way, and what is refused."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rawloop.adapters.config import AdapterConfig
from rawloop.build import build_run
from rawloop.checkpoint.config import CheckpointConfig
from rawloop.checkpoint.slots import find_slots, read_manifest, write_manifest
from rawloop.config import RunConfig
from rawloop.data import DataConfig
from rawloop.diagnose.config import ChecksConfig
from rawloop.dist import World
from rawloop.errors import CheckpointError, UserError
from rawloop.evaluate import EvaluationConfig
from rawloop.families import ModelConfig
from rawloop.files import FileRecord, sha256_file
from rawloop.loop import Run, TrainConfig, train
from rawloop.optim import OptimConfig
from rawloop.precision.config import LossScaleConfig, PrecisionConfig
from rawloop.records import read_events, read_metrics

FULL = AdapterConfig(mode="full")
FP16 = PrecisionConfig("native_fp16", loss_scale=LossScaleConfig(init=2.0**10))
Ranks = Callable[..., list[Any]]


@pytest.fixture
def first(text_checkpoint: Path, text_data: Path, tmp_path: Path) -> RunConfig:
    """The run that others start from: four steps, all saved and evaluated. Its base model may be changed."""
    shutil.copytree(text_checkpoint, tmp_path / "base")
    return RunConfig(
        output=str(tmp_path / "first"),
        device="cpu",
        model=ModelConfig(path=str(tmp_path / "base")),
        adapter=AdapterConfig(rank=2),
        data=DataConfig(train=str(text_data / "train.jsonl"), eval=str(text_data / "eval.jsonl")),
        train=TrainConfig(batch_size=1, max_steps=4, log_every=1),
        optim=OptimConfig(lr=3e-3),
        precision=PrecisionConfig(mode="fp32"),
        checks=ChecksConfig(enabled=False),
        evaluation=EvaluationConfig(every=1, batch_size=5),
        checkpoint=CheckpointConfig(save_every=1, keep_last=0, asynchronous=False),
    )


def finish(
    config: RunConfig, change: Callable[[Run], None] = lambda run: None, world: World | None = None
) -> tuple[Run, list[str]]:
    """Train to the end; returns the run and what it has said."""
    said: list[str] = []
    run = build_run(config, world or World(), said.append)
    try:
        change(run)
        train(run)
    finally:
        run.close()
    return run, said


def second(first: RunConfig, given: str, **changes: Any) -> RunConfig:
    """Another run with another seed and rate, that starts from `given` of the first one."""
    new = replace(first, output=f"{first.output}-second", init_from=given, seed=5, optim=OptimConfig(lr=1e-3))
    return replace(new, **changes)


def content(run: Path) -> dict[str, bytes]:
    files = (path for path in (run / "checkpoints").rglob("*") if path.is_file())
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("form", ["best", "latest", "checkpoints/step-00000003", "checkpoints/step-00000003/adapter"])
def test_the_weights_are_taken_and_nothing_else(first: RunConfig, form: str) -> None:
    finish(first)
    losses = {line["step"]: line["eval_loss"] for line in read_metrics(Path(first.output)) if "eval_loss" in line}
    given = f"{first.output}/{form}"
    run, said = finish(second(first, given))
    step = 3 if "3" in form else 4  # the loss falls at every step
    assert min(losses, key=lambda at: float(losses[at] or 9)) == 4
    folder = Path(run.records.folder)
    measured = [line for line in read_metrics(folder) if "eval_loss" in line]
    assert [line["step"] for line in measured] == [0, 1, 2, 3, 4]
    assert measured[0]["eval_loss"] == losses[step]
    assert run.state.samples == 4
    assert run.best is not None
    assert {int(state["step"]) for state in run.optimizer.state.values()} == {4}
    slot = Path(first.output) / (form if form == "best" else f"checkpoints/step-{step:08d}")
    slot = slot.resolve()
    (line,) = [line for line in said if line.startswith("weights from ")]
    assert re.fullmatch(
        rf"weights from {slot} at step {step} \(digest \w{{16}}\); counters, optimizer, schedule, random streams and "
        "best value start anew",
        line,
    )
    (event,) = [event for event in read_events(folder) if "init_from" in event]
    stored = json.loads((find_slots(folder)[0] / "state" / "config.json").read_text())
    assert event["init_from"] == stored["init_from"]
    assert (event["init_from"]["given"], event["init_from"]["checkpoint"]) == (given, str(slot))
    assert event["init_from"]["step"] == step


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_word(first: RunConfig) -> None:
    finish(first)
    damage(first)
    _, said = finish(second(first, f"{first.output}/latest"))
    assert any("step-00000003 at step 3" in line for line in said)
    assert any(re.match("skipped a damaged checkpoint: .*adapter_model.safetensors has changed", line) for line in said)


def test_an_adapter_that_was_copied_is_taken(first: RunConfig, tmp_path: Path) -> None:
    finish(first)
    shutil.copytree(Path(first.output) / "best" / "adapter", tmp_path / "copy")
    _, said = finish(second(first, str(tmp_path / "copy")))
    expected, _ = finish(second(first, f"{first.output}/best", output=f"{tmp_path}/other"))
    assert any(f"weights from {tmp_path}/copy, which has no manifest (digest" in line for line in said)
    ours, theirs = content(Path(f"{first.output}-second")), content(Path(expected.records.folder))
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if ours[name] != theirs[name]} == {
        f"checkpoints/step-0000000{step}/{name}" for step in range(5) for name in ("MANIFEST.json", "state/config.json")
    }


def killed(run: Run) -> None:
    """Die before the third step."""
    rate = run.lr

    def lr(step: int) -> float:
        if step == 2:
            raise KeyboardInterrupt
        return rate(step)

    run.lr = lr


def test_the_same_command_goes_on_from_its_own_checkpoint(first: RunConfig, tmp_path: Path) -> None:
    finish(first)
    config = second(first, f"{first.output}/best", resume="auto")
    finish(replace(config, output=f"{tmp_path}/straight"))
    with pytest.raises(KeyboardInterrupt):
        finish(config, killed)
    shutil.rmtree(first.output)  # as when rotation has deleted it
    run, said = finish(config)
    assert run.state.step == 4
    assert f"init_from {config.init_from} is done: the run resumes from its own checkpoint" in said
    assert content(Path(config.output)) == content(tmp_path / "straight")
    # without the key it goes on too, and remembers
    run, _ = finish(replace(config, init_from=None, resume="latest", train=TrainConfig(1, 1, max_steps=5, log_every=1)))
    stored = json.loads((find_slots(Path(config.output))[0] / "state" / "config.json").read_text())
    assert (run.state.step, stored["init_from"]["given"]) == (5, config.init_from)


def test_a_run_that_died_before_its_first_checkpoint_starts_from_the_weights_again(
    first: RunConfig, tmp_path: Path
) -> None:
    """As torchrun starts it again, without --resume, and as a scheduler does, with --resume auto."""
    finish(first)
    config = second(first, f"{first.output}/best", checkpoint=CheckpointConfig(3, asynchronous=False))
    config = replace(config, evaluation=EvaluationConfig(enabled=False))
    finish(replace(config, output=f"{tmp_path}/straight"))
    for name, resume, world in (("a", None, World(launch="x")), ("b", "auto", World())):
        own = replace(config, output=f"{tmp_path}/{name}", resume=resume)
        with pytest.raises(KeyboardInterrupt):
            finish(own, killed, world)
        assert not find_slots(Path(own.output))
        finish(own, world=replace(world, restarts=1) if world.launch else world)
        assert content(Path(own.output)) == content(tmp_path / "straight")


def test_a_resume_that_contradicts_is_refused(first: RunConfig) -> None:
    finish(first)
    finish(second(first, f"{first.output}/checkpoints/step-00000002"))
    other = second(first, f"{first.output}/checkpoints/step-00000003", resume="latest")
    for resume in ("latest", "auto", f"{other.output}/checkpoints/step-00000002"):
        with pytest.raises(
            UserError, match=r"init_from is '.*0003', and the run that is resumed was started from '.*0002"
        ):
            build_run(replace(other, resume=resume), World(), lambda line: None)
    with pytest.raises(UserError, match="and the run that is resumed was not started from a checkpoint's weights"):
        build_run(replace(first, resume="auto", init_from=f"{first.output}-second/best"), World(), lambda line: None)
    with pytest.raises(UserError, match="already holds a run"):
        build_run(replace(other, resume=None), World(), lambda line: None)


@pytest.mark.parametrize("now", ["fp32", "native_fp16"])
def test_the_masters_of_16_bit_weights_are_taken(first: RunConfig, now: str) -> None:
    then, _ = finish(replace(first, adapter=FULL, precision=FP16))
    masters = {name: then.policy.trained.value(name) for name in then.policy.trained.weights}
    assert any(not torch.equal(master, master.half().float()) for master in masters.values())
    precision = FP16 if now == "native_fp16" else first.precision
    said: list[str] = []
    run = build_run(second(first, f"{first.output}/latest", adapter=FULL, precision=precision), World(), said.append)
    run.close()
    assert any(f"the values of the checkpoint's {len(masters)} float32 masters" in line for line in said)
    for name, master in masters.items():
        assert torch.equal(run.policy.trained.value(name), master), name
        assert torch.equal(run.policy.trained.weights[name].detach().float(), master.half().float()) or now == "fp32"


def test_a_notice_says_that_the_residuals_of_an_older_version_are_not_taken(first: RunConfig) -> None:
    finish(replace(first, adapter=FULL, precision=FP16))
    (slot, *_) = find_slots(Path(first.output))
    file, manifest = slot / "state" / "precision.json", read_manifest(slot)
    file.write_text(file.read_text().replace('"Masters"', '"Residuals"'))
    record = FileRecord(file.stat().st_size, sha256_file(file))
    (slot / "MANIFEST.json").unlink()
    write_manifest(slot, replace(manifest, files={**manifest.files, "state/precision.json": record}))
    said: list[str] = []
    build_run(second(first, f"{first.output}/latest", adapter=FULL), World(), said.append).close()
    assert any("the weights are taken in 16 bits, without the checkpoint's residuals" in line for line in said)


def test_weights_over_a_base_that_is_stored_in_16_bits_are_not_rounded(first: RunConfig) -> None:
    base = Path(first.model.path)
    weights = {name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    then, _ = finish(replace(first, adapter=FULL))
    run = build_run(second(first, f"{first.output}/latest", adapter=FULL), World(), lambda line: None)
    run.close()
    for name, weight in then.policy.trained.weights.items():
        assert weight.dtype == torch.float32
        assert torch.equal(run.policy.trained.weights[name], weight), name


def other_base(first: RunConfig) -> dict[str, Any]:
    file = Path(first.model.path) / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][-1] += 1e-3
    save_file(weights, file, metadata={"format": "pt"})
    return {}


def damage(first: RunConfig) -> dict[str, Any]:
    file = Path(first.output) / "checkpoints/step-00000004/adapter/adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    return {"init_from": f"{first.output}/checkpoints/step-00000004"}


REFUSED: dict[str, tuple[Callable[[RunConfig], dict[str, Any]], str]] = {
    "rank": (lambda first: {"adapter": AdapterConfig(rank=4)}, r"does not fit the model: .* of another shape"),
    "alpha": (
        lambda first: {"adapter": AdapterConfig(rank=2, alpha=1.0)},
        "with adapter.alpha 32.0, this run has 1.0",
    ),
    "full": (
        lambda first: {"adapter": FULL},
        r"which holds an adapter \(adapter.mode lora\), and this run trains a whole model \(adapter.mode full\): set",
    ),
    "base": (other_base, "the frozen weights are not those that the checkpoint was trained on"),
    "damage": (damage, "adapter_model.safetensors has changed since it was written"),
    "run": (lambda first: {"init_from": first.output}, r"which is a run: say .*/first/best or .*/first/latest"),
    "nothing": (
        lambda first: {"init_from": f"{first.output}/nothing"},
        "which is no folder: name RUN/best",
    ),
    "state": (lambda first: {"init_from": f"{first.output}/best/state"}, "which holds no weights of a model: name"),
    "other": (lambda first: {"init_from": str(Path(first.output).parent)}, "holds no safetensors"),
    "no run": (
        lambda first: {"init_from": f"{first.model.path}/latest"},
        "no checkpoint of .* is whole: name",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_is_written(first: RunConfig, case: str) -> None:
    finish(first)
    change, message = REFUSED[case]
    config = second(first, f"{first.output}/best")
    config = replace(config, **change(first))
    with pytest.raises((UserError, CheckpointError), match=message):
        build_run(config, World(), lambda line: None)
    assert not any(path for path in Path(config.output).glob("*") if path.name != ".lock")


def on_ranks(world: World, config: RunConfig, dies: bool) -> list[float]:
    """Train on two ranks, to the end or until all of them die; returns this rank's first trained weights."""
    try:
        run, _ = finish(config, killed if dies else lambda run: None, world)
    except KeyboardInterrupt:
        return []
    return next(iter(run.policy.trained.weights.values())).detach().flatten()[:4].tolist()


def test_two_processes_killed_and_started_again(first: RunConfig, run_ranks: Ranks, tmp_path: Path) -> None:
    finish(first)
    config = second(first, f"{first.output}/best", resume="auto")
    whole = replace(config, output=f"{tmp_path}/whole")
    assert run_ranks(on_ranks, config, True) == [[], []]
    assert [read_manifest(slot).step for slot in find_slots(Path(config.output))] == [2, 1, 0]
    mine, other = run_ranks(on_ranks, config, False)
    assert mine == other == run_ranks(on_ranks, whole, False)[0]
    assert content(Path(config.output)) == content(Path(whole.output))
