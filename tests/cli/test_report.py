"""`rawloop report`: the page of a real run, what it refuses and in which words, and that it disturbs no run."""

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rawloop.cli import main

Door = Callable[..., Any]
Refusal = Callable[..., str]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, write_config: Callable[..., Path]) -> Path:
    """The folder of a finished run of 3 steps. Read it only."""
    folder = tmp_path_factory.mktemp("trained")
    assert main(["train", "--config", str(write_config(folder))]) == 0
    return folder / "run"


def test_the_page_of_a_run(door: Door, trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "page.html"
    done = door("report", trained, "--output", output)
    assert (done.code, done.err) == (0, "")
    assert re.fullmatch(rf"wrote {output} \(\d+\.\d kB\)\n", done.out)
    html = output.read_text()
    for said in (
        "all 3 steps are done",
        "3 of 3 steps",
        "Loss of &#39;audio&#39; by codebook",
        "Label census",
        "lora, rank 4",
    ):
        assert said in html
    assert "Not read" not in html
    assert "http" not in html
    written = door("report", "--compare", trained, trained.parent / "run" / ".." / "run")
    assert "names a run twice" in written.err


def test_two_runs(door: Door, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("metrics.jsonl", "events.jsonl", "config.yaml"):
        (other / name).write_bytes((trained / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    done = door("report", "--compare", trained, other)
    assert done.code == 0
    assert done.out.startswith("wrote compare.html (")
    assert "bit for bit the losses of run, up to step 3." in (tmp_path / "compare.html").read_text()
    assert not (trained / "report.html").exists()


def test_what_is_refused(refusal: Refusal, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, said in (
        ([], "name a run's folder, or several after --compare"),
        ([trained, "--compare", trained], "name a run's folder, or several after --compare"),
        ([tmp_path / "none"], f"'{tmp_path}/none' is no folder: name a run's folder"),
        ([tmp_path / "empty"], f"'{tmp_path}/empty' is no run"),
        ([trained, "--output", trained / "metrics.jsonl"], "its name must end in .html or .htm"),
        ([trained, "--output", tmp_path / "none" / "a.html"], f"there is no folder '{tmp_path}/none'"),
        (["--compare", trained], "--compare has 1 run(s): name 2 to 8"),
        ([trained, "--outptu", "a.html"], "(did you mean '--output'?)"),
    ):
        assert said in refusal("report", *arguments)


def test_a_missing_package_is_told_before_anything_is_read(
    refusal: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr("rawloop.report.page.find_spec", lambda name: None if name == "matplotlib" else real(name))
    said = "a page needs matplotlib, which is not installed: run `pip install 'rawloop[report]'`"
    assert refusal("report", tmp_path / "none") == said
