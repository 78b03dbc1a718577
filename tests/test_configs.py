"""Every config that is shipped runs: two steps through the real command, only paths and sizes changed.

A file of `configs/cards/` is run after the recipe that its launch line names. The family that a recipe names decides
which tiny checkpoint it gets; the demo's, if it names none.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from rawloop.cards import CUDA
from rawloop.cli import main
from rawloop.components import build_family
from rawloop.config import parse
from rawloop.estimate import estimate, skeleton_of
from rawloop.records import read_events, read_metrics
from rawloop.sizing import made_up

ROOT = Path(__file__).parent.parent
FILES = {str(path.relative_to(ROOT)): path for path in sorted((ROOT / "configs").glob("**/*.yaml"))}
# run by tests/families/test_audio_chat.py and test_phi4_multimodal.py, which have their checkpoints
ELSEWHERE = ("configs/audio_chat_lora.yaml", "configs/phi4_multimodal_lora.yaml")
LAUNCH = re.compile(r"(?:single_node\.sh|--config) (configs/\S+\.yaml)")
# Many CPUs compute slowly in 16 bits; and of two recipes of one kind one is enough where time counts.
SLOW = (
    *("configs/cards/gpu_16gb.yaml", "configs/cards/gpu_24gb.yaml", "configs/cards/h200_x8.yaml"),
    *("configs/cards/mac.yaml", "configs/cards/titan_rtx.yaml", "configs/cards/v100.yaml"),
    *("configs/higgs_vietnamese_lora.yaml", "configs/higgs_arabic_lora.yaml"),
)


def launch_lines(name: str) -> list[list[str]]:
    """The configs of each launch line at the head of a file."""
    head = "".join(line for line in FILES[name].read_text().splitlines(keepends=True) if line.startswith("#"))
    lines = re.sub(r"\\\n#\s*", "", head).splitlines()
    return [LAUNCH.findall(line) for line in lines if "single_node.sh" in line]


def settings_of(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(FILES[name].read_text())
    return loaded


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
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in FILES if name not in ELSEWHERE],
)
def test_two_steps(name: str, places: Callable[[str], dict[str, Path]], tmp_path: Path) -> None:
    run = tmp_path / "run"
    files = (launch_lines(name) or [[name]])[0]
    assert files[-1] == name
    chosen = [word for file in files for word in ("--config", str(ROOT / file))]
    shipped = parse(chosen, "test")[0]
    changed: dict[str, Any] = {
        "output": run,
        "device": "cpu",
        "checks.expect_chance": True,  # the weights are random
        **places(shipped.model.family),
        "data.num_workers": min(1, shipped.data.num_workers),
        "train.max_steps": 2,
        "train.batch_size": 2,
        "train.max_frames": min(400, shipped.train.max_frames),
        "train.accumulation": min(2, shipped.train.accumulation),
        "listen.samples": min(1, shipped.listen.samples),
        "listen.max_seconds": 0.4,
    }
    options = [f"--{key}={value}" for key, value in changed.items()]
    assert main(["train", *chosen, *options]) == 0
    evaluated = [line["step"] for line in read_metrics(run) if "eval_loss" in line]
    assert evaluated[0] == 0
    assert evaluated[-1] == 2
    assert (run / "best" / "MANIFEST.json").is_file()
    assert (run / "checkpoints" / "step-00000002" / "MANIFEST.json").is_file()
    unusual = [event["reason"] for event in read_events(run) if event["kind"] in ("skip", "warning", "fallback")]
    assert not [reason for reason in unusual if "references are drawn for" not in reason]
    used = yaml.safe_load((run / "config.yaml").read_text())
    for file, later in zip(files, [*files[1:], None]):  # what the files ask for is what ran
        for group in ("adapter", "optim", "precision", "evaluation", "checkpoint", "ddp"):
            over = settings_of(later).get(group, {}) if later else {}
            asked = {key: value for key, value in settings_of(file).get(group, {}).items() if key not in over}
            assert used[group].items() >= asked.items()


def test_there_are_configs() -> None:
    tasks = {"higgs_lora", "higgs_vietnamese_lora", "higgs_vietnamese_full", "higgs_voice_clone_lora", "causal_lm_lora"}
    assert {FILES[name].stem for name in FILES} >= {"demo", *tasks, "audio_chat_lora", "phi4_multimodal_lora"}


@pytest.mark.parametrize("name", [name for name in FILES if name != "configs/demo.yaml"])
def test_a_recipe_has_its_launch_line_its_memory_and_its_place_on_the_page(name: str) -> None:
    text = FILES[name].read_text(encoding="utf-8")
    lines = launch_lines(name)
    assert lines
    for files in lines:
        assert name in files
        assert set(files) <= set(FILES), files
    assert len(re.findall(r"Memory.*, an estimate", text)) == 1
    assert "warmup_steps" not in text  # the number of steps follows from the data
    assert "max_steps" not in text
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert f"(../{name})" in page


PLANNED = re.compile(r"an estimate(?:, for Higgs)?: (\d+\.\d) GB.*?--positions (\d+)(?: --samples (\d+))?", re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FILES if "higgs" in name or "cards" in name])
def test_the_memory_of_a_recipe_is_the_plans(name: str, demo_checkpoint: Path, tmp_path: Path) -> None:
    head = " ".join(line.lstrip("# ") for line in FILES[name].read_text().splitlines() if line.startswith("#"))
    said = PLANNED.search(head)
    if name == "configs/cards/mac.yaml":
        assert said is None  # no CUDA
        return
    assert said, head
    settings = json.loads((demo_checkpoint / "model" / "config.json").read_text())
    sizes = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "head_dim": 128}
    sizes |= {"num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 128256}
    folder = tmp_path / "model"
    shutil.copytree(demo_checkpoint / "model", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "config.json").write_text(json.dumps(settings | sizes | {"dtype": "bfloat16"}))
    files = [word for file in launch_lines(name)[0] for word in ("--config", str(ROOT / file))]
    config = parse([*files, f"--model.path={folder}"], "test")[0]
    family = build_family(replace(config, model=replace(config.model, activation_checkpointing=False)))
    batch = made_up(family, int(said[2]), int(said[3] or config.train.batch_size))
    assert batch.inputs["input_ids"].numel() <= (config.train.max_frames or 4000)
    found = estimate(config, family, skeleton_of(config, family), batch)
    assert (found.total + CUDA) / 1e9 == pytest.approx(float(said[1]), abs=0.11)
