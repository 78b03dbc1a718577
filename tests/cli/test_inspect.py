"""`rawloop inspect` on the demo: what it shows of a batch, and that it shows labels as they are, right or wrong."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rawloop.data import DataConfig
from rawloop.data.samples import read_samples
from rawloop.families.higgs_audio_v2 import HiggsAudioV2

Door = Callable[..., Any]
Refusal = Callable[..., str]


def ids_of(folder: Path) -> list[str]:
    return [Path(s["audio_file"]).stem for s in json.loads((folder / "metadata.json").read_text())["samples"]]


@pytest.fixture
def sample(demo_data: Path) -> str:
    """A sample with one clip."""
    return next(name for name in ids_of(demo_data / "train") if "-en-" in name)


def clips(out: str) -> list[list[list[str]]]:
    """The cells of the grids: per clip, per codebook."""
    rows = [re.split(r"\s+", line.strip())[2:] for line in out.splitlines() if line.startswith("    book ")]
    return [rows[start : start + 8] for start in range(0, len(rows), 8)]


def test_one_sample_with_its_turns_codes_and_labels(door: Door, config: Path, sample: str) -> None:
    done = door("inspect", "--config", config, "--sample", sample)
    assert done.code == 0, done
    lines = done.out.splitlines()
    assert re.fullmatch(r"a batch of 1 x \d+ positions, 0\.0% of them padding", lines[0])
    assert re.match(r"targets: audio \d+, text 2;", lines[1])
    assert lines[2].split() == ["sample", "task", "positions", "audio", "targets", "text", "targets"]
    assert lines[3].split()[0] == sample
    roles = [line for line in lines if re.fullmatch(r"system|scene|user|assistant", line)]
    assert [role for role in roles if role != "scene"][-2:] == ["user", "assistant"]
    assert [line for line in lines if "[[" in line and not line.startswith("targets")] == [
        "    [[<|audio_eos|><|eot_id|>]]"
    ]
    assert "\x1b" not in done.out


def test_the_delay_pattern_and_the_stop_tokens_are_seen(door: Door, config: Path, sample: str) -> None:
    (grid,) = clips(door("inspect", "--config", config, "--sample", sample).out)
    assert len(grid) == 8
    for k, row in enumerate(grid):
        assert row[: k + 1] == ["BOS"] * (k + 1)
        assert row[-(8 - k) :] == ["[EOS]", *["EOS"] * (7 - k)]
        assert all(re.fullmatch(r"\[\d+\]", cell) for cell in row[k + 1 : -(8 - k)])


def test_the_first_batch_of_training_and_its_padding(door: Door, config: Path, demo_data: Path) -> None:
    out = door("inspect", "--config", config, "--train.batch_size", "3").out
    first = out.splitlines()[0]
    padding = re.search(r"3 x (\d+) positions, ([\d.]+)% of them", first)
    assert padding
    shown = [line.split() for line in out.splitlines()[3:6]]
    assert {row[0] for row in shown} <= set(ids_of(demo_data / "train"))
    used = sum(int(row[2]) for row in shown)
    assert float(padding[2]) == pytest.approx(100 * (1 - used / (3 * int(padding[1]))), abs=0.05)
    assert len(re.findall(r"^== ", out, re.MULTILINE)) == 3


def test_references_have_no_labels(door: Door, config: Path, demo_data: Path) -> None:
    samples = read_samples(str(demo_data / "eval"), DataConfig())
    cloning = next(sample.id for sample in samples if len(sample.audio_paths()) == 2)
    reference, learnt = clips(door("inspect", "--config", config, "--split", "eval", "--sample", cloning).out)
    assert not any("[" in cell for row in reference for cell in row)
    assert all("[" in "".join(row) for row in learnt)


def test_the_evaluation_split(door: Door, config: Path, demo_data: Path) -> None:
    out = door("inspect", "--config", config, "--split", "eval", "--evaluation.batch_size", "2").out
    assert [line.split()[1] for line in out.splitlines() if line.startswith("== ")] == ids_of(demo_data / "eval")[:2]


def test_labels_that_are_wrong_look_wrong(
    door: Door, config: Path, sample: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not shifted, each label stands on the frame after its own; without stop token, nothing learnt is called EOS."""
    honest = HiggsAudioV2.collate

    def collate(self: HiggsAudioV2, examples: list[Any]) -> Any:
        batch = honest(self, examples)
        audio = batch.labels["audio"]
        masked = audio.targets.masked_fill(audio.targets == 1025, -100)
        batch.labels["audio"] = audio._replace(positions=audio.positions + 1, targets=masked)
        return batch

    (right,) = clips(door("inspect", "--config", config, "--sample", sample).out)
    monkeypatch.setattr(HiggsAudioV2, "collate", collate)
    (grid,) = clips(door("inspect", "--config", config, "--sample", sample).out)
    first, second = (cell.strip("[]") for cell in right[0][1:3])
    assert grid[0][1:3] == [first, f"[{second}>{first}]"]
    assert not any("EOS" in cell.split(">")[-1] for row in grid for cell in row if "[" in cell)


def test_on_a_terminal_what_is_masked_is_dimmed(
    door: Door, config: Path, sample: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = door("inspect", "--config", config, "--sample", sample).out
    monkeypatch.undo()
    learnt = [line for line in out.splitlines() if "<|audio_eos|>" in line]
    assert learnt == ["    [[<|audio_eos|><|eot_id|>]]"]
    assert any(line.startswith("    \x1b[2m<|start_header_id|>user") for line in out.splitlines())
    assert "\x1b[2mBOS \x1b[0m" in out
    assert not re.search(r"\x1b\[2m *\[\w+\]", out)  # no code that is learnt
    assert out.count("\x1b[2m") == out.count("\x1b[0m") > 0


def test_what_is_not_there_is_named(refusal: Refusal, config: Path, demo_data: Path) -> None:
    first = ids_of(demo_data / "train")[0]
    said = refusal("inspect", "--config", config, "--sample", f"no-{first}")
    assert f"--sample is 'no-{first}' (did you mean '{first}'?)" in said
    said = refusal("inspect", "--config", config, "--split", "evals")
    assert said == "--split is 'evals': it must be one of 'train', 'eval'"
