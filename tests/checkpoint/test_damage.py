"""Damage to the checkpoints of a real run: all of it is found, and the run goes on from what is whole."""

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rawloop.adapters.config import AdapterConfig
from rawloop.build import build_run
from rawloop.checkpoint.best import BestTracker
from rawloop.checkpoint.config import CheckpointConfig
from rawloop.checkpoint.manager import CheckpointManager
from rawloop.checkpoint.slots import verify
from rawloop.config import RunConfig
from rawloop.data import DataConfig
from rawloop.diagnose.config import ChecksConfig
from rawloop.dist import World
from rawloop.errors import CheckpointError, RawloopError, UserError
from rawloop.evaluate import EvaluationConfig
from rawloop.families import ModelConfig
from rawloop.loop import TrainConfig, train
from rawloop.precision.config import PrecisionConfig
from rawloop.records import Records, RecordsConfig, read_events


def go(config: RunConfig, before: Callable[[], None] = lambda: None) -> int:
    """Train, after `before`, and return the step from which it was."""
    run = build_run(config, World(), lambda line: None)
    start = run.state.step
    try:
        before()
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
    shutil.copytree(trained.output, run, symlinks=True)
    damage(run / "checkpoints" / "step-00000004" / name)
    assert go(replace(trained, output=str(run), resume="latest")) == 3
    told = [event["reason"] for event in read_events(run) if event["kind"] == "warning"]
    assert any(text.startswith("skipped a damaged checkpoint: ") and Path(name).name in text for text in told)
    assert (run / "checkpoints" / "discarded" / "step-00000004").is_dir()
    assert verify(run / "checkpoints" / "step-00000004").step == 4  # trained once more
    named = replace(trained, output=str(tmp_path / "other"), resume=str(run / "checkpoints/discarded/step-00000004"))
    with pytest.raises(CheckpointError, match=Path(name).name):
        go(named)


def test_a_manifest_of_another_run_does_not_fit(trained: RunConfig, tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(trained.output, run, symlinks=True)
    go(replace(trained, output=str(other), seed=1))
    manifest = Path("checkpoints") / "step-00000004" / "MANIFEST.json"
    shutil.copy(other / manifest, run / manifest)
    assert go(replace(trained, output=str(run), resume="latest")) == 3
    told = [event["reason"] for event in read_events(run) if event["kind"] == "warning"]
    assert any("has changed since it was written" in text or "were written" in text for text in told)


# -- folders that cannot be written into -------------------------------------------------------------------------------


def lock(folder: Path, *, locked: bool) -> None:
    """Make a folder and all that is in it read-only, or writable again."""
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o555 if path.is_dir() else 0o444) if locked else 0o755)


@pytest.mark.usefixtures("permissions_count")
def test_a_read_only_folder_is_told_before_a_model_is_loaded_and_can_be_resumed_from(
    trained: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "locked" / "run"
    shutil.copytree(trained.output, run, symlinks=True)
    lock(run.parent, locked=True)
    with monkeypatch.context() as patch:
        patch.setattr("rawloop.components.load_family", None)  # not needed
        with pytest.raises(UserError, match=r"^output is '.*/locked/new', which cannot be created: Permission denied"):
            go(replace(trained, output=str(run.parent / "new")))
        with pytest.raises(UserError, match=r"^output is '.*', and nothing can be written into .*/run: Permission den"):
            go(replace(trained, output=str(run), resume="latest"))
        lock(run.parent, locked=False)
        lock(run / "checkpoints", locked=True)
        with pytest.raises(UserError, match=r"and nothing can be written into .*/run/checkpoints: Permission denied"):
            go(replace(trained, output=str(run), resume="latest"))
    lock(run, locked=True)
    slot = run / "checkpoints" / "step-00000004"
    other = replace(
        trained, output=str(tmp_path / "other"), resume=str(slot), train=replace(trained.train, max_steps=5)
    )
    assert go(other) == 4
    assert verify(tmp_path / "other" / "checkpoints" / "step-00000005").step == 5
    assert all(verify(each) for each in (run / "checkpoints").iterdir())
    lock(run.parent, locked=False)


@pytest.mark.usefixtures("permissions_count")
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_folder_that_becomes_read_only_ends_the_run_after_some_saves_and_loses_none(
    trained: RunConfig, tmp_path: Path, asynchronous: bool
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.output, run, symlinks=True)
    longer = replace(
        trained,
        output=str(run),
        resume="latest",
        train=replace(trained.train, max_steps=12),
        checkpoint=replace(trained.checkpoint, asynchronous=asynchronous),
    )
    slots = sorted(path.name for path in (run / "checkpoints").iterdir())
    with pytest.raises(CheckpointError, match=r"no permission to write there .*Still there: step-00000004, "):
        go(longer, before=lambda: (run / "checkpoints").chmod(0o555))
    told = [event["reason"] for event in read_events(run) if event["kind"] == "warning" and "cannot" in event["reason"]]
    assert "; training continues, and ends after 3 failed saves in a row" in told[0]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == slots
    (run / "checkpoints").chmod(0o755)
    assert go(longer) == 4
    assert verify(run / "checkpoints" / "step-00000012").step == 12


@pytest.mark.usefixtures("permissions_count")
@pytest.mark.parametrize("place", [".", "checkpoints"])
def test_a_folder_that_becomes_unreadable_is_said_in_words(tmp_path: Path, place: str) -> None:
    part: dict[str, Any] = {"tracker": BestTracker()}
    with Records(tmp_path / "run", World(), RecordsConfig()) as records:
        manager = CheckpointManager(tmp_path / "run", CheckpointConfig(), World(), records, part)
        manager.start(0)
        manager.save(1)
        manager.wait_until_written()
        (tmp_path / "run" / place).chmod(0)
        manager.save(2)
        manager.wait_until_written()
        assert manager.newest() is None
        for call in (manager.finish, manager.load, lambda: manager.ensure_saved(2)):
            with pytest.raises(RawloopError, match="ermission"):
                call()
        (tmp_path / "run" / place).chmod(0o755)
        told = [event["reason"] for event in read_events(tmp_path / "run") if event["kind"] == "warning"]
        assert told[0].startswith("cannot save step-00000002 at step 2 in ")
        assert "there is no permission to write there" in told[0]
        assert ". Earlier checkpoints cannot be read now: there is no permission" in told[0]
        manager.save(3)
        manager.close()
    assert verify(tmp_path / "run" / "checkpoints" / "step-00000003").step == 3
