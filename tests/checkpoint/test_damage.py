"""Damage to the checkpoints of a real run: all of it is found, and the run goes on from what is whole."""

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from rawloop.adapters import AdapterConfig
from rawloop.build import build_run
from rawloop.checkpoint import CheckpointConfig, verify
from rawloop.config import RunConfig
from rawloop.data import DataConfig
from rawloop.diagnose import ChecksConfig
from rawloop.dist import World
from rawloop.errors import CheckpointError
from rawloop.evaluate import EvaluationConfig
from rawloop.families import ModelConfig
from rawloop.loop import TrainConfig, train
from rawloop.precision import PrecisionConfig
from rawloop.records import read_events


def go(config: RunConfig) -> int:
    """Train, and return the step from which it was."""
    run = build_run(config, World(), lambda line: None)
    start = run.state.step
    try:
        train(run)
    finally:
        run.close()
    return start


@pytest.fixture(scope="module")
def trained(text_checkpoint: Path, text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A LoRA run in mixed precision that has ended after 4 steps, with a checkpoint of each. Copy it."""
    config = RunConfig(
        output=str(tmp_path_factory.mktemp("trained") / "run"),
        device="cpu",
        model=ModelConfig(path=str(text_checkpoint)),
        adapter=AdapterConfig(rank=2),
        data=DataConfig(train=str(text_data / "train.jsonl"), eval=str(text_data / "eval.jsonl")),
        train=TrainConfig(batch_size=1, max_steps=4, log_every=1),
        precision=PrecisionConfig("amp_fp16"),
        checks=ChecksConfig(enabled=False),
        evaluation=EvaluationConfig(every=2),
        checkpoint=CheckpointConfig(save_every=1, keep_last=0),
    )
    go(config)
    return config


def test_500_flipped_bits_of_a_real_checkpoint_are_all_found(trained: RunConfig, tmp_path: Path) -> None:
    slot, rng = tmp_path / "slot", random.Random(0)
    shutil.copytree(Path(trained.output) / "checkpoints" / "step-00000004", slot)
    files = sorted(path for path in slot.rglob("*") if path.is_file())
    assert {"MANIFEST.json", "adapter_model.safetensors", "optimizer.safetensors"} <= {path.name for path in files}
    found = 0
    for number in range(500):
        path = files[number % len(files)]
        data = bytearray(path.read_bytes())
        place, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
        data[place] ^= bit
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=path.name):
            verify(slot)
        found += 1
        data[place] ^= bit
        path.write_bytes(data)
    verify(slot)
    print(f"{found} of 500 flipped bits found, in {len(files)} files")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flip, halve, Path.unlink], ids=["flip", "halve", "unlink"])
@pytest.mark.parametrize(
    "name",
    ["MANIFEST.json", "state/optimizer.safetensors", "state/precision.json", "adapter/adapter_model.safetensors"],
)
def test_a_run_goes_on_from_the_newest_whole_checkpoint_and_keeps_the_damaged_one(
    trained: RunConfig, tmp_path: Path, damage: Callable[[Path], None], name: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.output, run)
    damage(run / "checkpoints" / "step-00000004" / name)
    assert go(replace(trained, output=str(run), resume="latest")) == 3
    told = [event["reason"] for event in read_events(run) if event["kind"] == "warning"]
    assert any(text.startswith("passed over a checkpoint: ") and Path(name).name in text for text in told)
    assert (run / "checkpoints" / "discarded" / "step-00000004").is_dir()
    assert verify(run / "checkpoints" / "step-00000004").step == 4  # trained once more
    named = replace(trained, output=str(tmp_path / "other"), resume=str(run / "checkpoints/discarded/step-00000004"))
    with pytest.raises(CheckpointError, match=Path(name).name):
        go(named)


def test_a_manifest_of_another_run_does_not_fit(trained: RunConfig, tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(trained.output, run)
    go(replace(trained, output=str(other), seed=1))
    manifest = Path("checkpoints") / "step-00000004" / "MANIFEST.json"
    shutil.copy(other / manifest, run / manifest)
    assert go(replace(trained, output=str(run), resume="latest")) == 3
    told = [event["reason"] for event in read_events(run) if event["kind"] == "warning"]
    assert any("has changed since it was written" in text or "were written" in text for text in told)
