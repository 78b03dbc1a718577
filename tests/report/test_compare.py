"""The page of several runs: where their losses part, bit for bit, and what differs."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from rawloop.errors import UserError
from rawloop.report.compare import compare
from rawloop.report.plots import COLORS

from .conftest import CONFIG, EVENTS, event, metrics

Write = Callable[..., Path]
Words = Callable[[str], str]


def page(*folders: Path) -> str:
    return compare(folders, [False] * len(folders))


@pytest.mark.usefixtures("no_figures")
def test_the_first_step_at_which_losses_differ(write_run: Write, words: Words) -> None:
    loss = [13.0 - k for k in range(12)]
    other = [*loss[:7], math.nextafter(loss[7], 0.0), *loss[8:]]
    text = words(page(write_run("a"), write_run("b"), write_run("c", metrics(loss=other)), write_run("d", metrics(8))))
    assert "b: bit for bit the losses of a, up to step 55." in text
    assert f"c: first apart from a at step 35: loss is {other[7]!r}, not 6.0; 1 of 72 losses in common differ." in text
    assert "d: bit for bit the losses of a, up to step 35." in text


@pytest.mark.usefixtures("no_figures")
def test_nan_equals_nan_and_runs_may_have_nothing_in_common(write_run: Write, words: Words) -> None:
    ill = metrics(loss=[math.nan])
    text = words(page(write_run("a", ill), write_run("b", ill), write_run("c", []), write_run("d", [{"step": 3}])))
    assert "b: bit for bit the losses of a" in text
    assert "c: no step has a loss in both this run and a." in text
    assert "d: no step has a loss in both" in text


@pytest.mark.usefixtures("no_figures")
def test_settings_and_values_that_differ(write_run: Write, words: Words) -> None:
    changed = {**CONFIG, "output": "runs/b", "optim": {**CONFIG["optim"], "lr": 0.001}}  # type: ignore[dict-item]
    events = [*EVENTS, event("skip", 5, "x"), event("start", 9, "x", world_size=4, device="cpu", torch="2.13.0")]
    text = words(page(write_run("a"), write_run("b", metrics(8), events, changed)))
    assert "Settings that differ a b world_size 2 4 optim.lr 0.003 0.001" in text
    assert "Values a b steps 55 35 updates skipped 0 1 fallbacks 0 0 best evaluation - - last loss 2 6" in text
    assert "Settings that differ none." in words(page(*(write_run(name) for name in "cd")))


def test_every_run_has_its_color_in_every_figure(write_run: Write) -> None:
    books = {"loss": 1.0, "loss/audio/0": 1.0}
    runs = {"a": books, "b": {**books, "cer": 0.5}, "c<i>": {**books, "cer": 0.7}}
    html = page(*(write_run(name, [{"step": 0, **values}]) for name, values in runs.items()))
    legends = [dict(re.findall(r"(#\w+)\"></i>(.*?)</", found)) for found in re.findall('class="legend">(.*)', html)]
    colors = dict(zip(COLORS, ("a", "b", "c&lt;i&gt;"), strict=False))
    without = {color: name for color, name in colors.items() if name != "a"}
    assert [legend for legend in legends if legend] == [colors, without]
    assert html.count("by codebook of ") == 3
    assert html.count("<h3>Events of ") == 3


@pytest.mark.usefixtures("no_figures")
def test_runs_of_one_name_are_told_apart(write_run: Write, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    html = page(write_run("x/run"), write_run("y/run"))
    assert html.count(f"{tmp_path}/x/run") >= 3
    assert html.count(f"{tmp_path}/y/run") >= 3


def test_too_few_too_many_and_twice(write_run: Write) -> None:
    folder = write_run()
    for folders, said in (
        ([folder], "has 1 run(s): name 2 to 8"),
        ([folder] * 9, "has 9 run(s)"),
        ([folder] * 2, "twice"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            page(*folders)
