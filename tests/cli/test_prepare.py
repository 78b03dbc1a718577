"""`rawloop prepare` in real processes: one, two and four, and killed again and again."""

import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import soundfile

from rawloop.demo import SPEECH

Ranks = Callable[..., list[Any]]
KILLS = 20


def contents(cache: Path) -> dict[str, bytes]:
    """Every file with codes, by its path. An index has their times, and report.json counts what was encoded last."""
    return {
        str(path.relative_to(cache)): path.read_bytes() for path in cache.glob("*/*") if path.parent.name != "index"
    }


def clips_of(cache: Path) -> dict[str, Any]:
    """What report.json says about the clips, whoever encoded them."""
    report = json.loads((cache / "report.json").read_text(encoding="utf-8"))
    return {key: report[key] for key in ("samples", "clips", "bad", "left_out")}


def test_two_ranks_print_one_line(ranks: Ranks, config: Path, tmp_path: Path) -> None:
    first, second = ranks("prepare", "--config", config, "--data.codes", tmp_path / "codes")
    assert (first.code, second.code, second.out) == (0, 0, ""), (first, second)
    assert re.match(r"codes of (\d+) clips in .*: \1 encoded now, 0 already there, 0 left out; ", first.out), first


def test_a_mistake_is_told_once(ranks: Ranks, config: Path, tmp_path: Path) -> None:
    done = ranks("prepare", "--config", config, "--data.train", tmp_path / "gone")
    assert [one.code for one in done] == [2, 2]
    assert ["does not exist" in one.err for one in done] == [True, False]


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    """The bundled speech of the training split at 8 levels each, 384 clips, and one that cannot be used."""
    folder = tmp_path / "speech"
    folder.mkdir()
    samples = []
    for path in sorted((SPEECH / "train").glob("*.flac")):
        wave, rate = soundfile.read(path, dtype="float32")
        for level in range(8):
            name = f"{path.stem}-{level:02}.wav"
            soundfile.write(folder / name, wave * (1 - 0.03 * level), rate)
            samples.append({"audio_file": name, "transcript": "Words."})
    (folder / "bad.wav").write_text("no audio", encoding="utf-8")
    samples.insert(200, {"audio_file": "bad.wav", "transcript": "Words."})
    (folder / "metadata.json").write_text(json.dumps({"samples": samples}), encoding="utf-8")
    return folder


def kill(cache: Path, generator: random.Random) -> Callable[[list[int]], None]:
    """Give a function that kills processes at once, or after they have written a shard, and a random moment more."""

    def wait_and_kill(children: list[int]) -> None:
        before, deadline = len(list(cache.glob("*/files-*"))), time.monotonic() + generator.choice((0, 60, 60))
        while len(list(cache.glob("*/files-*"))) == before and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(generator.uniform(0.0, 0.5))
        for child in children:
            os.kill(child, signal.SIGKILL)

    return wait_and_kill


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_twenty_times_the_cache_is_that_of_an_undisturbed_run(
    ranks: Ranks, write_config: Callable[..., Path], speech: Path, tmp_path: Path
) -> None:
    """One, two or four processes are killed twenty times, half of the times after a new shard; then they may finish."""
    data = {"train": str(speech), "eval": None, "codes": None, "on_bad_sample": "skip"}
    command = ("prepare", "--config", write_config(tmp_path, data=data), "--data.codes")
    (done,) = ranks(*command, tmp_path / "whole", size=1, seconds=300)
    assert "384 encoded now" in done.out, done
    expected = contents(tmp_path / "whole")
    assert len([name for name in expected if "shard-" in name]) == 25
    for size in (2, 4):
        assert [one.code for one in ranks(*command, tmp_path / f"by{size}", size=size, seconds=300)] == [0] * size
        assert contents(tmp_path / f"by{size}") == expected
    seed = int.from_bytes(os.urandom(4))
    generator = random.Random(seed)
    cache, grown = tmp_path / "killed", 0
    for number in range(KILLS):
        before = len(list(cache.glob("*/files-*")))
        codes = [one.code for one in ranks(*command, cache, size=(1, 2, 4)[number % 3], then=kill(cache, generator))]
        grown += len(list(cache.glob("*/files-*"))) > before
        if set(codes) == {0}:  # it was faster than the kill: begin again
            assert contents(cache) == expected, seed
            for path in sorted(cache.rglob("*"), reverse=True):
                path.unlink() if path.is_file() else path.rmdir()
    (done,) = ranks(*command, cache, size=1, seconds=300)
    assert done.code == 0, (seed, done)
    assert contents(cache) == expected, seed
    assert clips_of(cache) == clips_of(tmp_path / "whole")
    assert grown >= 3, f"only {grown} of the kills came while clips were encoded (seed {seed})"
    print(f"{KILLS} kills, {grown} while clips were encoded; seed {seed}")


def test_a_report_is_written_before_the_codec_runs(
    door: Callable[..., Any], refusal: Callable[..., str], config: Path, tmp_path: Path
) -> None:
    page, codes = tmp_path / "report.html", ("--data.codes", str(tmp_path / "codes"))
    assert refusal("prepare", "--config", config, *codes, "--report", tmp_path / "report.txt").startswith(
        f"the page's file is '{tmp_path}/report.txt'"
    )
    done = door("prepare", "--config", config, *codes, "--report", page)
    assert done.code == 0, done
    assert re.match(r"report: \d+ of 13 clips are unusual: ", done.out), done
    assert page.read_text(encoding="utf-8").count("<svg") == 4
    assert len(json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))["clips"]) == 13
