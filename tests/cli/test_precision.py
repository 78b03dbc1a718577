"""`rawloop precision probe` and `compare` on a tiny text model: what they print, what they write, what they refuse."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rawloop.cli.precision import compare_lines, histogram, write_html
from rawloop.precision_race import Comparison, Errors, ModeResult, Race, recommend
from rawloop.watch.measure import Readings

Door = Callable[..., Any]
Refusal = Callable[..., str]


@pytest.fixture
def config(text_checkpoint: Path, text_data: Path, tmp_path: Path) -> Path:
    """The config of a run on the tiny text model; its folder stays empty."""
    settings = {
        "output": str(tmp_path / "run"),
        "device": "cpu",
        "model": {"path": str(text_checkpoint)},
        "adapter": {"mode": "full"},
        "data": {"train": str(text_data / "train.jsonl")},
        "train": {"batch_size": 2, "max_steps": 2},
        "evaluation": {"enabled": False},
        "optim": {"lr": 1e-3},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return tmp_path / "run.yaml"


def test_a_probe_prints_head_room_exponents_and_the_scales_that_fit(door: Door, config: Path, tmp_path: Path) -> None:
    file = tmp_path / "probe.json"
    done = door("precision", "probe", "--config", config, "--json", file)
    assert done.code == 0, done
    assert done.out.startswith("precision: fp32")
    for words in ("outputs, least head room", "gradients of parameters", "loss scales that fit FP16: 2^", "#", "bf16 "):
        assert words in done.out
    written = json.loads(file.read_text())
    assert {"embed", "lm_head"} <= {
        row["name"].rpartition(".")[2].partition("_tokens")[0] for row in written["outputs"]
    }
    low, high = written["window"]
    assert 2.0**low <= written["scale"] <= 2.0**high
    assert all(row["flushed"] < 0.05 for row in written["gradients"])
    assert written["lost_updates"]["fp32"] < written["lost_updates"]["bf16"]
    assert not (tmp_path / "run").exists()


def test_a_probe_in_fp16_says_what_it_cannot_see(door: Door, config: Path) -> None:
    done = door("precision", "probe", "--config", config, "--precision.mode", "amp_fp16")
    assert done.code == 0, done
    assert "loss scale of 32768 (of the pass)" in done.out
    assert "does not show what it flushed" in done.out


def test_the_modes_are_compared_and_one_is_recommended(
    door: Door, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rawloop.precision_race.MODES", ("fp32", "bf16"))  # each loads the model again
    file = tmp_path / "compare.json"
    options = ("--reference", "fp64", "--steps", "1", "--train.batch_size", "1", "--json", file)
    done = door("precision", "compare", "--config", config, *options)
    assert done.code == 0, done
    written = json.loads(file.read_text())
    errors = {result["mode"]: result["errors"]["relative"] for result in written["results"] if result["errors"]}
    assert errors["fp32"] < 1e-5 < errors["bf16"] < 0.1
    assert all(len(result["race"]["losses"]) == 1 for result in written["results"] if not result["why_not"])
    assert written["recommended"] in errors
    assert done.out.splitlines()[-1].startswith(f"recommended: precision.mode {written['recommended']}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "needs one of probe, compare first"),
        (("prob",), "did you mean 'probe'"),
        (("compare", "--reference", "fp8"), "--reference is 'fp8': it must be one of 'fp32', 'fp64'"),
        (("compare", "--steps", "-1"), "--steps is -1: it must be a whole number"),
        (("probe", "--json", "/no/such/folder/file"), "must name a file in a folder that exists"),
        (("compare", "--html", "page.txt"), "must end in .html"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(
    refusal: Refusal, config: Path, arguments: tuple[str, ...], words: str
) -> None:
    given = (*arguments, "--config", config) if arguments and arguments[0] in ("probe", "compare") else arguments
    assert words in refusal("precision", *given)


GOOD = Errors(1e-3, 0.99999, 0.0, 0.0)


def result(
    mode: str, final: float = 2.0, seconds: float = 1.0, errors: Errors | None = GOOD, **more: Any
) -> ModeResult:
    return ModeResult(mode, errors=errors, race=Race([final] * 8, seconds=seconds, **more))


def test_a_page_of_the_comparison(tmp_path: Path) -> None:
    results = [result("fp32"), result("bf16", seconds=0.5), ModeResult("amp_fp16", "it does not fit")]
    results[1].modules = {"head": Errors(0.01, 0.9999, 0.0, 0.0)}
    write_html(tmp_path / "page.html", Comparison("fp32", 8, ("a",), 1e-3, results, *recommend(results)), "a model")
    text = (tmp_path / "page.html").read_text()
    for words in ("Recommended mode", "amp_fp16 is left out", "<svg", "head"):
        assert words in text


@pytest.mark.parametrize(
    ("results", "mode"),
    [
        ([result("fp32"), result("bf16", seconds=0.5), result("amp_fp16", seconds=0.49)], "bf16"),
        ([result("fp32"), result("bf16", seconds=0.95)], "fp32"),
        ([result("fp32"), result("bf16", 2.1, seconds=0.5), result("amp_fp16", seconds=0.6)], "amp_fp16"),
        ([result("fp32"), result("bf16", math.nan, seconds=0.1)], "fp32"),
        ([result("fp32"), result("amp_fp16", seconds=0.1, skipped=6)], "fp32"),
        ([result("fp32"), result("amp_fp16", seconds=0.1, ended="step 3: too many skips")], "fp32"),
        ([result("fp32"), result("bf16", seconds=0.1, errors=Errors(1.0, 0.5, 0.0, 0.4))], "fp32"),
        ([result("fp32", errors=None)], ""),
        ([ModeResult("fp32", "it does not fit"), result("bf16")], "bf16"),
    ],
)
def test_the_fastest_good_mode_is_recommended_with_reasons(results: list[ModeResult], mode: str) -> None:
    recommended, reasons = recommend(results)
    assert recommended == mode
    assert len(reasons) == sum(not result.why_not for result in results)
    lines = list(compare_lines(Comparison("fp32", 8, ("a",), 1e-3, results, recommended, reasons)))
    assert ("none of these" in lines[-1]) == (not mode)


def test_the_bars_of_a_histogram_tell_flushed_from_subnormal() -> None:
    readings = Readings()
    readings.add("gradient", "w", torch.tensor([2.0**-30, 2.0**-30, 2.0**-20, 1.0]))
    (amounts,) = readings.read().values()
    lines = list(histogram(amounts.exponents, 2.0))
    assert len(lines) == 31
    assert lines[0].split()[-1] == "#" * 25
    assert lines[20].split()[-1] == "+" * 25
    assert lines[-1].split()[-1] == "." * 50
