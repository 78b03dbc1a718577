"""Clips in real commands: codes without their audio, limits changed after encoding, what is left out and said."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import soundfile

from rawloop.records import read_metrics

Door = Callable[..., Any]
Write = Callable[..., Path]


@pytest.fixture
def bare(demo_data: Path, tmp_path: Path) -> Path:
    """The demo's records, transcripts and codes, moved to another place without a single audio file."""
    folder = tmp_path / "data"
    shutil.copytree(demo_data, folder, ignore=shutil.ignore_patterns("*.flac"))
    return folder


def paths(folder: Path) -> dict[str, str]:
    return {split: str(folder / split) for split in ("train", "eval", "codes")}


def test_codes_without_audio_files_train_alike(door: Door, write_config: Write, bare: Path, tmp_path: Path) -> None:
    assert not list(bare.rglob("*.flac"))
    for name, data in (("whole", {}), ("bare", paths(bare))):
        done = door("train", "--config", write_config(tmp_path / name, data=data))
        assert done.code == 0, done.err
    losses = [
        [line.get("loss", line.get("eval_loss")) for line in read_metrics(tmp_path / name / "run")]
        for name in ("whole", "bare")
    ]
    assert losses[0] == losses[1]


def test_audio_that_has_changed_is_still_noticed(
    refusal: Door, write_config: Write, bare: Path, demo_data: Path, tmp_path: Path
) -> None:
    samples = json.loads((bare / "train" / "metadata.json").read_text())["samples"]
    one, other = (demo_data / "train" / sample["audio_file"] for sample in samples[:2])
    shutil.copy(one, bare / "train" / one.name)  # another time, the same content
    config = write_config(tmp_path, data=paths(bare), train={"max_steps": 1})
    (bare / "train" / other.name).write_bytes(one.read_bytes() + b"\0")
    line = refusal("train", "--config", config)
    assert line.startswith(f"1 clip(s) changed since they were encoded: {bare / 'train' / other.name}"), line


def test_a_clip_that_may_have_lost_its_end_is_named_by_each_command(
    door: Door, write_config: Write, demo_data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(demo_data / "eval", folder / "eval")
    shutil.copytree(demo_data / "codes", folder / "codes")
    file = folder / "eval" / "metadata.json"
    sample = json.loads(file.read_text())["samples"][0]
    wave, rate = soundfile.read(folder / "eval" / sample["audio_file"])
    clip = folder / "eval" / "cut.ogg"
    soundfile.write(clip, wave, rate)
    content = clip.read_bytes()
    clip.write_bytes(content[: content.rindex(b"OggS")])
    file.write_text(json.dumps({"samples": [{**sample, "audio_file": "cut.ogg"}]}))
    data = {"train": None, "eval": str(folder / "eval"), "codes": str(folder / "codes")}
    config = write_config(tmp_path, data=data)
    for command in (("prepare",), ("inspect", "--split", "eval")):
        done = door(*command, "--config", config)
        assert done.code == 0, done.err
        assert "1 clip(s) do not say where they end" in done.err
        assert str(clip) in done.err


def test_a_limit_that_was_lowered_after_encoding(
    door: Door, refusal: Door, config: Path, demo_data: Path, tmp_path: Path
) -> None:
    line = refusal("train", "--config", config, "--data.max_seconds", 1.7)
    assert "clip(s) that cannot be used: " in line
    assert " s, longer than data.max_seconds (1.7 s))" in line
    done = door("train", "--config", config, "--data.max_seconds", 1.7, "--data.on_bad_sample", "skip")
    assert done.code == 0, done.err
    assert "samples left out" in done.out


def test_a_sample_that_is_too_long_with_its_text(
    door: Door, refusal: Door, write_config: Write, bare: Path, tmp_path: Path
) -> None:
    """Its clips alone are short: only the whole of it tells, and before step 0."""
    file = bare / "train" / "metadata.json"
    samples = json.loads(file.read_text())["samples"]
    del samples[3]["transcript_file"]
    samples[3]["transcript"] = "one two three " * 2000
    file.write_text(json.dumps({"samples": samples}))
    config = write_config(tmp_path, data=paths(bare))
    line = refusal("train", "--config", config)
    assert line.startswith(
        f"1 of 8 samples cannot be used: sample '{samples[3]['id']}' (metadata.json samples[3]): it "
    ), line
    assert line.endswith("leave the sample out. Or leave them out: --data.on_bad_sample skip"), line
    assert not (tmp_path / "run" / "events.jsonl").exists()
    done = door("train", "--config", config, "--data.on_bad_sample", "skip")
    assert done.code == 0, done.err
    assert "data.train: 1 of 8 samples left out, since data.on_bad_sample is skip" in done.out
    assert f"sample '{samples[3]['id']}'" in done.out
    shown = door("inspect", "--config", config, "--data.on_bad_sample", "skip", "--sample", samples[3]["id"])
    assert shown.code == 2


def test_a_text_that_is_too_long(door: Door, refusal: Door, text_checkpoint: Path, tmp_path: Path) -> None:
    texts = ["la " * 5, "la " * 5000, "lo " * 6]
    lines = [json.dumps({"id": f"s{number}", "text": text}) + "\n" for number, text in enumerate(texts)]
    (tmp_path / "train.jsonl").write_text("".join(lines))
    start = ["inspect", f"--model.path={text_checkpoint}", f"--data.train={tmp_path}"]
    assert "1 of 3 samples cannot be used: sample 's1' (train.jsonl line 2): it takes " in refusal(*start)
    done = door(*start, "--data.on_bad_sample=skip")
    assert done.code == 0, done.err
    assert "data.train: 1 of 3 samples left out" in done.err
