"""`rawloop import`: what it prints, and the command that it prints at the end."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rawloop.demo import SPEECH

Door = Callable[..., Any]


@pytest.fixture
def recordings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder's `recordings`: 12 bundled clips as LJSpeech; the second has no words."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recordings" / "wavs").mkdir(parents=True)
    samples = json.loads((SPEECH / "train" / "metadata.json").read_text(encoding="utf-8"))["samples"]
    rows: list[str] = []
    for sample in [one for one in samples if "transcript" in one][:12]:
        shutil.copy(SPEECH / "train" / sample["audio_file"], tmp_path / "recordings" / "wavs")
        rows.append(f"{Path(sample['audio_file']).stem}|{sample['transcript'] if len(rows) != 1 else ''}\n")
    (tmp_path / "recordings" / "metadata.csv").write_text("".join(rows), encoding="utf-8")
    return Path("recordings")


@pytest.mark.parametrize("options", [[], ["--copy"], ["--eval", "0"]])
def test_the_printed_command_works(door: Door, recordings: Path, config: Path, options: list[str]) -> None:
    Path("configs").mkdir()
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    settings["data"] = {"train": "data/train", "eval": "data/eval"}
    Path("configs/higgs_lora.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    done = door("import", recordings, "--output", "data/my voice", "--eval", "0.2", *options)
    assert done.code == 0, done
    lines = done.out.splitlines()
    assert lines[0] == "imported 11 clips from a metadata.csv of LJSpeech"
    assert "  left out, empty transcript: 1 (metadata.csv line 2)" in lines
    program, *words = shlex.split(lines[-1].removeprefix("next: "))
    assert program == "rawloop"
    assert ("--data.allow_outside" in words) == ("--copy" not in options)
    done = door(*words)
    assert done.code == 0, done
    assert "11 encoded now, 0 already there, 0 left out" in done.out


def test_a_mistake_is_one_line(refusal: Callable[..., str], recordings: Path) -> None:
    assert refusal("import", "gone", "--output", "out").startswith("gone does not exist: name a folder or file")
    assert refusal("import", recordings) == "--output must be given; `rawloop import --help` lists all options"
    assert refusal("import") == "SOURCE and --output must be given; `rawloop import --help` lists all options"
    assert refusal("import", recordings, "--output", "out", "--eval", "2").startswith("--eval is 2: it is a share")
    assert refusal("import", recordings, "--output", "recordings/metadata.csv").endswith("a file: name a folder")
    assert not Path("out").exists()


def test_a_share_of_the_training_data_is_evaluated(
    door: Door, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = write_config(tmp_path, data={"eval": None, "eval_share": 0.25})
    done = door("train", "--config", config)
    assert done.code == 0, done
    assert "trained 3 steps" in done.out
    resumed = door("train", "--config", config, "--resume", "latest", "--data.eval_share", "0.5")
    assert resumed.code == 2
    assert "other samples" in resumed.err
    done = door("evaluate", "--config", config, "--checkpoint", "latest")
    assert done.code == 0, done
    (refused,) = [line for line in door("train", "--config", config, "--data.eval", "x").err.splitlines() if line]
    assert refused.startswith("rawloop train: data.eval_share is 0.25 and data.eval is 'x': set one of them")
