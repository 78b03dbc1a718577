"""Every config that is shipped runs: two steps through the real command on the demo, only paths and sizes changed."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from rawloop.cli import main
from rawloop.config import parse
from rawloop.records import read_events, read_metrics

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("**/*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_two_steps(config: Path, demo_checkpoint: Path, demo_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    changed: dict[str, Any] = {
        "output": run,
        "device": "cpu",
        "model.path": demo_checkpoint / "model",
        "model.codec": demo_checkpoint / "codec",
        "data.train": demo_data / "train",
        "data.eval": demo_data / "eval",
        "data.codes": demo_data / "codes",
        "checks.expect_chance": True,  # the demo's weights are random
        "data.num_workers": min(1, parse(["--config", str(config)], "test")[0].data.num_workers),
        "train.max_steps": 2,
        "train.batch_size": 2,
        "train.accumulation": min(2, parse(["--config", str(config)], "test")[0].train.accumulation),
    }
    options = [f"--{key}={value}" for key, value in changed.items()]
    assert main(["train", "--config", str(config), *options]) == 0
    evaluated = [line["step"] for line in read_metrics(run) if "eval_loss" in line]
    assert evaluated[0] == 0
    assert evaluated[-1] == 2
    assert (run / "best" / "MANIFEST.json").is_file()
    assert (run / "checkpoints" / "step-00000002" / "MANIFEST.json").is_file()
    assert not [event for event in read_events(run) if event["kind"] in ("skip", "warning", "fallback")]
    asked, used = yaml.safe_load(config.read_text()), yaml.safe_load((run / "config.yaml").read_text())
    for group in ("adapter", "optim", "precision", "evaluation", "checkpoint", "ddp"):
        assert used[group].items() >= asked.get(group, {}).items()  # what the file asks for is what ran


def test_there_are_configs() -> None:
    assert {path.stem for path in CONFIGS} >= {"demo", "higgs_lora"}
