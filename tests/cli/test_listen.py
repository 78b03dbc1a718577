"""A voice that is heard while it trains: clips, pictures, metrics, the best by ear, and the page."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import soundfile
from torch import Tensor

from rawloop.records import read_metrics
from rawloop.report import one

Door = Callable[..., Any]
MODULE = "tests.cli.test_listen"
CALLS: list[tuple[str, int]] = []


def words_of(sound: Tensor, sample_rate: int) -> str:
    """A transcriber that always hears the same."""
    CALLS.append(("words", sample_rate))
    return "The boats, come home?"


def length_alike(sound: Tensor, voice: Tensor, sample_rate: int) -> float:
    """A similarity: the share of their lengths."""
    CALLS.append(("alike", sample_rate))
    return min(len(sound), len(voice)) / max(len(sound), len(voice))


def heard_in(folder: Path) -> dict[int, dict[str, Any]]:
    lines = [line for line in read_metrics(folder) if "listen/stopped" in line]
    return {int(line["step"] or 0): {k: v for k, v in line.items() if k.startswith("listen/")} for line in lines}


def test_a_voice_is_heard_measured_and_shown(door: Door, write_config: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("Hello.\n", encoding="utf-8")
    listen = {"samples": 2, "prompts": str(tmp_path / "lines.txt"), "longest": 1.0, "max_seconds": 0.4}
    listen |= {"transcriber": f"{MODULE}:words_of", "similarity": f"{MODULE}:length_alike"}
    best = {"every": 3, "best_metric": "listen/length_ratio", "best_mode": "max"}
    config = write_config(tmp_path, listen=listen, evaluation=best, records={"report_to": ["tensorboard"]})
    CALLS.clear()
    done = door("train", "--config", config)
    assert done.code == 0, done.err
    run = tmp_path / "run"
    heard = heard_in(run)
    assert list(heard) == [0, 3]
    for step, metrics in heard.items():
        folder = run / "listen" / f"step-{step:08d}"
        lines = json.loads((folder / "heard.json").read_text(encoding="utf-8"))
        assert [line["name"] for line in lines][-1] == "line 1"
        seconds = []
        for line in lines:
            sound, rate = soundfile.read(folder / line["wav"], dtype="float32")
            seconds.append(len(sound) / rate)
            assert seconds[-1] == pytest.approx(line["seconds"])
            assert (folder / line["wav"]).with_suffix(".png").read_bytes()[1:4] == b"PNG"
        assert max(seconds) <= 0.4
        assert metrics["listen/stopped"] == pytest.approx(sum(line["stopped"] for line in lines) / 3)
        assert 0 <= metrics["listen/silence"] <= 1
        assert 0 < metrics["listen/similarity"] <= 1
        first = next(line for line in lines if line["words"].startswith("The boats"))
        assert first["recognised"] == "The boats, come home?"
        assert metrics["listen/error_rate"] > 0
    assert {rate for _, rate in CALLS} == {24_000}
    best = json.loads((run / "best.json").read_text())
    assert best["value"] == max(metrics["listen/length_ratio"] for metrics in heard.values())
    page = one.report(run)
    assert page.count('src="data:audio/wav;base64,') == page.count('src="data:image/png;base64,') == 6
    assert "The boats come home at dusk." in page
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"audio": 0})
    events.Reload()
    assert len(events.Tags()["audio"]) == 3
