"""`rawloop generate`: from a run, a checkpoint, an adapter and a model to wav files and texts; mistakes in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import soundfile

from rawloop.demo import SPEECH

Door = Callable[..., Any]
Refusal = Callable[..., str]
CLIP = SPEECH / "eval" / "eval-en-02.flac"
SHORT = ("--max_seconds", "0.4", "--device", "cpu", "--sampling.temperature", "0")


def heard(path: Path) -> bytes:
    sound, rate = soundfile.read(path, dtype="int16")
    assert rate == 24_000
    assert 0 < len(sound) <= 0.4 * rate
    return bytes(sound.tobytes())


def test_every_name_of_a_trained_model_is_heard_the_same(door: Door, demo_run: Path, tmp_path: Path) -> None:
    (slot,) = (path for path in (demo_run / "checkpoints").iterdir() if path.name.endswith("3"))
    names = {
        "run": (demo_run,),
        "slot": ("--checkpoint", slot, demo_run),
        "adapter": ("--adapter", demo_run / "best" / "adapter"),
        "copied": (shutil.copytree(demo_run / "best" / "adapter", tmp_path / "adapter"), "--scene", "A small room."),
    }
    clips = {}
    for name, words in names.items():
        done = door("generate", *words, "--text", "Hello.", "--output", tmp_path / f"{name}.wav", *SHORT)
        assert done.code == 0, done.err
        assert done.out.startswith(f"{tmp_path / name}.wav: 0.")
        assert "of the largest (bound 1e-04)" in done.err
        assert "expect noise" in done.err
        clips[name] = heard(tmp_path / f"{name}.wav")
    assert len(set(clips.values())) == 1, {name: len(clip) for name, clip in clips.items()}
    other = door(
        "generate", demo_run, "--text", "Hello.", "--scene", "A street.", "--output", tmp_path / "o.wav", *SHORT
    )
    assert other.code == 0
    assert heard(tmp_path / "o.wav") != clips["run"]  # the scene of the training is in the prompt


def test_lines_references_and_records_are_spoken_and_a_seed_repeats_them(
    door: Door, demo_run: Path, demo_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "lines.txt").write_text("One.\n\nTwo, three.\n", encoding="utf-8")
    model = demo_checkpoint / "model"  # of no run
    voice = ("--reference", CLIP, "--reference_text", "The words.")
    lines = ("generate", model, "--lines", tmp_path / "lines.txt", *voice, *SHORT)
    said = [door(*lines, "--output", tmp_path / name) for name in "ab"]
    assert [done.code for done in said] == [0, 0], said
    names = ["001-line-1.wav", "002-line-2.wav"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == names
    assert all(heard(tmp_path / "a" / name) == heard(tmp_path / "b" / name) for name in names)
    record = {"id": "x", "audio_file": "none.wav", "transcript": "One.", "scene": "quiet_room"}
    (tmp_path / "lines.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    done = door("generate", model, "--lines", tmp_path / "lines.jsonl", "--output", tmp_path / "c", *SHORT)
    assert done.code == 0, done.err
    heard(tmp_path / "c" / "001-x.wav")


def test_a_model_of_text_prints_what_it_writes(door: Door, text_checkpoint: Path, tmp_path: Path) -> None:
    asked = ("generate", text_checkpoint, "--text", "Say it.", "--max_tokens", "5", "--device", "cpu")
    done = door(*asked)
    assert done.code == 0, done.err
    assert done.out
    assert door(*asked, "--output", tmp_path / "said.txt").code == 0
    assert (tmp_path / "said.txt").read_text(encoding="utf-8") == done.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("RUN",), "give --text, or --lines with a file of texts"),
        (("--text", "x"), "name one model: a run, a checkpoint, an adapter or a model's folder, such as runs/voice"),
        (("RUN", "--adapter", "x", "--text", "x"), "name one model"),
        (("RUN", "--text", "x"), "--output must be given: the wav file, or a folder"),
        (("RUN", "--text", "x", "--output", "x.wav", "--checkpoint", "lates"), "--checkpoint is 'lates', which is no"),
        (("RUN", "--text", "x", "--output", "x.wav", "--reference", "no.wav"), "--reference is 'no.wav': there is no"),
        (("RUN", "--text", "x", "--reference_text", "x"), "--reference_text is given without --reference"),
        (("RUN", "--text", "x <|eot_id|>", "--output", "x.wav"), "the prompt 1"),
        (("RUN", "--lines", "no.txt", "--output", "x"), "'no.txt' cannot be read"),
        (("RUN", "--text", "x", "--max_seconds", "0"), "--max_seconds is 0.0: it must be above 0"),
        (("RUN", "--text", "x", "--output", "x.wav", "--sampling.top_p", "2"), "sampling.top_p is 2.0: it must be"),
        (("RUN", "--text", "x", "--output", "x.wav", "--dtype", "float8"), "--dtype is 'float8'"),
        (("nothing", "--text", "x", "--output", "x.wav"), "model.path is 'nothing': no such folder"),
    ],
)
def test_a_mistake_is_one_line(refusal: Refusal, demo_run: Path, words: tuple[str, ...], said: str) -> None:
    assert said in refusal("generate", *(demo_run if word == "RUN" else word for word in words))
