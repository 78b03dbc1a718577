"""The page of one run: what became of it in words, everything that it has recorded, and nothing that it has not."""

import json
import math
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from rawloop.errors import UserError
from rawloop.report import one
from rawloop.report.one import report

from .conftest import CONFIG, EVENTS, event, lines, metrics

Write = Callable[..., Path]
Words = Callable[[str], str]
BEST = json.dumps({"metric": "eval_loss", "mode": "min", "value": 7.5, "step": 30})
CENSUS = {
    "samples": 32,
    "without_targets": ["lost <i>"],
    "codebooks": {"audio": 3},
    "roles": [{"role": "assistant", "stream": "audio", "positions": 100, "targets": 150}],
    "specials": [{"stream": "audio", "name": "<|eos|>", "id": 5, "required": True, "roles": [], "targets": [4, 4, 4]}],
}


@pytest.mark.usefixtures("no_figures")
def test_the_first_words_are_the_outcome(write_run: Write, words: Words) -> None:
    text = words(report(write_run(best__json=BEST), is_running=False))
    assert text.startswith(
        "a Training: 55 of 55 steps, 11 epochs. Finished: all 55 steps are done. "
        "Best: eval_loss 7.5000 at step 30, -44.4% against the first evaluation, 13.5000. Settings"
    )
    assert "Incidents" not in text


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    ("more", "is_running", "said"),
    [
        ([], True, "Still running: a process trains this run now."),
        ([event("start", 56, "training", total_steps=90)], False, "Crashed or killed: the last line is of 2001-09-09"),
        ([event("start", 56, "training", total_steps=90)], None, "No end is recorded: the last line is of 2001-09-09"),
        ([event("start", 56, "training")], False, "No end is recorded: "),
        ([event("stop", 55, "stopped by SIGTERM")], False, "Stopped: at step 55: stopped by SIGTERM."),
        (
            [event("stop", 55, "stopped by SIGTERM"), event("start", 60, "", total_steps=60)],
            False,
            "Finished: all 60 steps are done. Incidents: started again 1 time.",
        ),
    ],
)
def test_how_a_run_ended(write_run: Write, words: Words, more: Any, is_running: bool | None, said: str) -> None:
    assert said in words(report(write_run(events=[*EVENTS, *more]), is_running))


@pytest.mark.usefixtures("no_figures")
def test_a_run_of_ones_own_loop_says_that_its_end_is_not_recorded(write_run: Write, words: Words) -> None:
    text = words(report(write_run(events=[], config={}), False))
    assert "Training: 55 steps, 11 epochs. End: how it ended is not recorded" in text
    assert "Settings setting value folder" in text


def test_what_a_run_has_recorded_is_on_its_page(write_run: Write, words: Words) -> None:
    events = [
        *EVENTS,
        *(event("skip", k, f"norm {k}", samples=["clip-7"]) for k in range(30)),
        event("fallback", 40, "too many skips", change="amp_fp16 -> bf16"),
        event("warning", 3, "slow disk"),
        event("warning", 9, "slow disk"),
        event("finding", 12, "ordinary: the scale falls.", finding={"kind": "scale_start", "ordinary": True}),
        event("finding", 20, "module 'x' overflows.", finding={"kind": "not_finite", "ordinary": False}),
        event("check", 0, "census of 32 samples", check="census"),
        event("check", 0, "first loss", verdicts=[
            {"name": "audio", "kind": "OK", "loss": 5.0, "chance": 6.9, "why": "better than guessing"},
            {"name": "audio/0", "kind": "OK", "loss": 5.0, "chance": 6.9, "why": "x", "mismatch": ""},
            {"name": "audio/1", "kind": "DEAD", "loss": 6.0, "chance": 6.9, "why": "no gradient", "mismatch": ""},
        ]),
    ]  # fmt: skip
    folder = write_run(events=events, census__json=json.dumps(CENSUS))
    kept = folder / "capsules" / "step-00000020-rank0"
    kept.mkdir(parents=True)
    (kept / "MANIFEST.json").write_text(json.dumps({"why": "finding not_finite"}))
    (folder / "capsules" / ".tmp-step").mkdir()
    html = report(folder)
    levels = [int(level) for level in re.findall(r"<h(\d)", html)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    text = words(html)
    for said in (
        "Incidents: 1 alarm among the findings; 30 updates skipped; fell back at step 40 (amp_fp16 -> bf16).",
        "Findings not_finite: module 'x' overflows. scale_start: ordinary: the scale falls.",
        "adapter lora, rank 8, alpha 16.0, dropout 0.0 precision amp_fp16, too many skips",
        "learning rate 0.003, cosine, 5 warm-up steps",
        "batch 16 samples a step (4 per pass, accumulation 2, world size 2)",
        "Losses Loss, all streams loss eval_loss",
        "Loss of 'audio' loss/audio eval_loss/audio",
        "Loss of 'audio' by codebook",
        "Training Learning rate Gradient norm Loss scale Samples per second Seconds per evaluation Events",
        "Other metrics mine",
        "10 more events of the kind 'skip' are in events.jsonl.",
        "0 skip 1 norm 0 (samples clip-7)",
        "3 warning 2 slow disk",
        "40 fallback 1 too many skips",
        "audio OK 5 6.9 better than guessing audio/1 DEAD 6 6.9 no gradient Label census",
        "1 samples have no target: lost <i>",
        "assistant audio 100 150 Special tokens",
        "<|eos|> audio True 4, 4, 4",
        f"step-00000020-rank0 finding not_finite rawloop replay {kept}",
    ):
        assert said in text
    assert "audio/0 OK" not in text
    assert ".tmp-step" not in text


def test_all_events_share_one_time_line(write_run: Write) -> None:
    skips = [event("skip", k, "x") for k in range(7)]
    html = report(write_run(found=[], events=[*EVENTS, *skips, event("warning", -1, "outside the steps")]))
    assert html.count("<figure>") == 1
    (line,) = re.findall(r"<h3>Events</h3>(.*?)</figure>", html, re.DOTALL)
    assert re.findall(r">(\w+ \d+)</text>", line) == ["start 1", "skip 7", "warning 1", "save 1", "best 1"]


def test_losses_that_are_not_finite_are_told_and_drawn(write_run: Write, words: Words) -> None:
    html = report(write_run(found=metrics(loss=[13.0, math.nan, math.inf])))
    assert "Incidents: loss is not finite in 2 of 12 lines, first at step 5." in words(html)
    (figure,) = re.findall(r"<h3>Loss, all streams</h3>(.*?)</figure>", html, re.DOTALL)
    assert len(re.findall(r"<use [^>]*var\(--alarm\)", figure)) == 2
    assert "1 nan, 1 inf, first at step 5" in words(figure)


def test_everything_from_outside_is_escaped(write_run: Write) -> None:
    evil = "<script>alert('x')</script>"
    config = {**CONFIG, "model": {"path": evil}, evil: {evil: evil}}
    events = [event("skip", 1, evil, samples=[evil]), event(evil, 1, evil), event("warning", 1, evil)]
    events += [event("finding", 1, evil, finding={"kind": evil}), event("check", 0, evil, verdicts=[{"name": evil}])]
    found = [{"step": 0, evil: 1.0, f"loss/{evil}": 2.0, f"loss/{evil}/0": 2.0, "loss": 1.0}]
    census = {
        **CENSUS,
        "without_targets": [evil],
        "roles": [{"role": evil, "stream": evil, "positions": 0, "targets": 0}],
    }
    folder = write_run(evil.replace("/", ""), found, [*EVENTS, *events], config, census__json=json.dumps(census))
    (folder / "audio").mkdir()
    (folder / "audio" / "<script>.wav").write_bytes(b"RIFF")
    (folder / "capsules" / "<script>").mkdir(parents=True)
    html = report(folder)
    assert "<script" not in html
    assert html.count("&lt;script&gt;") > 20


@pytest.mark.usefixtures("no_figures")
def test_sounds_are_embedded_up_to_a_limit(write_run: Write, words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run()
    monkeypatch.setattr(one, "CLIP_BYTES", 100)
    monkeypatch.setattr(one, "ALL_CLIPS_BYTES", 150)
    for name, size in (("audio/a.wav", 90), ("audio/step-5/b.FLAC", 60), ("audio/c.wav", 101), ("z.wav", 10)):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "d.wav").write_bytes(b"x")
    html = report(folder)
    assert re.findall(r'<audio [^>]*src="(data:[\w/]+;base64),', html) == [
        "data:audio/wav;base64",
        "data:audio/flac;base64",
    ]
    assert "at most 0.1 kB each and 0.1 kB together. Not in it: audio/c.wav (0.1 kB), z.wav (0.0 kB)." in words(html)


@pytest.mark.usefixtures("no_figures")
def test_a_run_without_metrics_has_a_page(write_run: Write, words: Words) -> None:
    folder = write_run(found=[])
    for _ in range(2):
        text = words(report(folder))
        assert "Training: there are no metrics, so there is nothing to draw (30 of 55 steps)." in text
        (folder / "metrics.jsonl").unlink(missing_ok=True)


@pytest.mark.usefixtures("no_figures")
def test_what_cannot_be_read_is_said_and_the_rest_is_shown(write_run: Write, words: Words) -> None:
    folder = write_run(best__json="[1]", census__json="{torn")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 60, "lo')  # a torn last line
    (folder / "config.yaml").write_text("a: [")
    text = words(report(folder))
    assert "55 of 55 steps" in text
    for name in ("config.yaml", "census.json"):
        assert f"Not read: {folder / name} cannot be read: " in text
    assert f"Not read: {folder / 'best.json'} cannot be read: it holds no object" in text
    (folder / "metrics.jsonl").write_text("{}\n")
    assert "metrics.jsonl line 1 is no object" in words(report(folder))
    (folder / "metrics.jsonl").write_text(lines(metrics()))
    (folder / "events.jsonl").write_text('{"step": 1}\n')
    assert "events.jsonl cannot be read: a line has no time" in words(report(folder))
    (folder / "census.json").write_text('{"samples": 3}')
    assert "Label census Counted in 3 samples." in words(report(folder))


@pytest.mark.usefixtures("no_figures")
def test_a_damaged_line_is_named_and_makes_no_crash_of_a_finished_run(write_run: Write, words: Words) -> None:
    folder = write_run(events=[*EVENTS, event("save", 55, "wrote step-00000055")])
    for damaged, why in (("\0\0", "is not JSON"), (f'{{"step": 55, "loss": 1{"0" * 400}}}', "too large")):
        (folder / "metrics.jsonl").write_text(f"{lines(metrics())}{damaged}\n")
        text = words(report(folder, is_running=False))
        assert text.startswith(f"a Not read: {folder / 'metrics.jsonl'} ")
        assert why in text
        assert "nothing to draw (55 of 55 steps). Finished: all 55 steps are done." in text


def test_what_is_no_run_is_refused(write_run: Write, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    file = tmp_path / "file"
    file.touch()
    bare = write_run("bare", [], [])
    torn = write_run("torn", [], [])
    (torn / "metrics.jsonl").write_text("no json\n")
    for folder, said in (
        (tmp_path / "none", "is no folder: name a run's folder"),
        (file, "is no folder"),
        (tmp_path / "empty", "is no run: it has no metrics.jsonl, no events.jsonl and no config.yaml"),
        (bare, "metrics.jsonl and events.jsonl have no complete line yet"),
        (torn, "metrics.jsonl line 1 is not JSON"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            report(folder)


def test_a_long_run_gives_a_small_page(write_run: Write, words: Words) -> None:
    found = [{"step": 20 * k, "loss": 1.0 + k % 7, "loss/audio/0": 1.0, "grad_norm": 1.0 + k} for k in range(4800)]
    html = report(write_run(found=found, events=[event("skip", k, "x") for k in range(5000)]))
    assert len(html) < 250_000
    assert "4,800 points are drawn as 400: a band from least to greatest, the mean inside." in words(html)


def test_the_same_run_gives_the_same_page(write_run: Write) -> None:
    folder = write_run(found=[{"step": k, "loss": 1.0, "loss/audio/0": 1.0} for k in range(3)])
    assert report(folder) == report(folder)
