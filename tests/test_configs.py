"""Every config that is shipped runs: two steps through the real command, only paths and sizes changed.

The family that a config names decides which tiny checkpoint it gets; the demo's, if it names none.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rawloop.cli import main
from rawloop.config import parse
from rawloop.records import read_events, read_metrics

# run by tests/families/test_audio_chat.py and test_phi4_multimodal.py, which have their checkpoints
AUDIO_CHAT = ("audio_chat_lora", "phi4_multimodal_lora")
CONFIGS = [
    path for path in sorted((Path(__file__).parent.parent / "configs").glob("**/*.yaml")) if path.stem not in AUDIO_CHAT
]

IN_16_BITS = ("lora_amp_v100", "lora_bf16_h200", "lora_mps")  # many CPUs compute slowly in these dtypes


@pytest.fixture
def places(request: pytest.FixtureRequest) -> Callable[[str], dict[str, Path]]:
    """Give `places(family)`: the keys that name files, with those of the family's tiny checkpoint and data."""

    def find(family: str) -> dict[str, Path]:
        if family == "causal_lm":
            data: Path = request.getfixturevalue("text_data")
            files = {f"data.{split}": data / f"{split}.jsonl" for split in ("train", "eval")}
            return {"model.path": request.getfixturevalue("text_checkpoint"), **files}
        assert family in ("auto", "higgs_audio_v2"), f"no tiny checkpoint for configs of the family {family}"
        checkpoint, data = request.getfixturevalue("demo_checkpoint"), request.getfixturevalue("demo_data")
        parts = {f"data.{part}": data / part for part in ("train", "eval", "codes")}
        return {"model.path": checkpoint / "model", "model.codec": checkpoint / "codec", **parts}

    return find


@pytest.mark.parametrize(
    "config",
    [pytest.param(path, marks=pytest.mark.slow) if path.stem in IN_16_BITS else path for path in CONFIGS],
    ids=lambda config: config.stem,
)
def test_two_steps(config: Path, places: Callable[[str], dict[str, Path]], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shipped = parse(["--config", str(config)], "test")[0]
    changed: dict[str, Any] = {
        "output": run,
        "device": "cpu",
        "checks.expect_chance": True,  # the weights are random
        **places(shipped.model.family),
        "data.num_workers": min(1, shipped.data.num_workers),
        "train.max_steps": 2,
        "train.batch_size": 2,
        "train.accumulation": min(2, shipped.train.accumulation),
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
    assert {path.stem for path in CONFIGS} >= {"demo", "higgs_lora", "causal_lm_lora"}
