"""README and docs are run: Python blocks, JSON examples, and the README's commands on the demo checkpoint."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rawloop.data.samples import read_samples
from rawloop.demo import SPEECH

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SETUP = ("launch/quickstart.sh", "launch/test.sh")  # the two commands that install; run by CI and by every newcomer


def blocks(language: str) -> list[tuple[str, str]]:
    """Every fenced block of a language, with the name of its page."""
    fence = re.compile(rf"^```{language}\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [(page.name, block) for page in PAGES for block in fence.findall(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(("page", "code"), blocks("python"))
def test_python_blocks_run(page: str, code: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("page", "text"), blocks("json"))
def test_json_examples_are_read_as_data(page: str, text: str, tmp_path: Path) -> None:
    for name in "abcd":
        shutil.copy(SPEECH / "eval" / "eval-en-02.flac", tmp_path / f"{name}.wav")
    (tmp_path / "a.txt").write_text("The words of a.", encoding="utf-8")
    file = tmp_path / ("metadata.json" if "samples" in json.loads(text) else "data.jsonl")
    file.write_text(text if file.suffix == ".json" else text.strip(), encoding="utf-8")
    found = [sample.task for sample in read_samples(tmp_path)]
    assert found in ([None], re.findall(r"^\| (\w+) \| [abcd] ", (ROOT / "docs" / "data.md").read_text(), re.MULTILINE))


def test_no_link_of_the_pages_is_broken() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_only_the_setup_commands_and_one_recipe_stand_in_bash_blocks() -> None:
    first, second = (code for _, code in blocks("bash"))
    assert all(command in first for command in SETUP)
    assert "rawloop prepare" in second


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_readmes_recipe_runs(demo_checkpoint: Path, tmp_path: Path) -> None:
    """The README's commands, letter by letter, on a recipe whose model, sizes and device are the demo's."""
    recipe = yaml.safe_load((ROOT / "configs" / "higgs_lora.yaml").read_text(encoding="utf-8"))
    recipe["model"] |= {"path": str(demo_checkpoint / "model"), "codec": str(demo_checkpoint / "codec")}
    recipe["train"] |= {"batch_size": 2, "max_steps": 2, "log_every": 1}
    recipe["data"]["num_workers"] = 1
    recipe["device"] = "cpu"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "higgs_lora.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    shutil.copytree(SPEECH, tmp_path / "data")
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    _, commands = (code for _, code in blocks("bash"))
    environment = {**os.environ, "NPROC": "2"}
    script = ["bash", "-euo", "pipefail", "-c", commands]
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "eval_loss" in done.stdout
    assert (tmp_path / "models" / "voice" / "model.safetensors").is_file()
    assert (tmp_path / "runs" / "voice" / "best" / "adapter" / "adapter_model.safetensors").is_file()
