"""The benchmark itself: rawloop does the bare loop's work, and other work is found out."""

from pathlib import Path
from typing import Any

import pytest


def test_rawloop_does_the_work_of_the_bare_loop(benchmark: Any, tmp_path: Path) -> None:
    steps = 3 * benchmark.TURN + 1
    results = {
        name: [got]
        for name, got in benchmark.run_round(["rawloop", "bare loop"], steps, tmp_path, benchmark.Work()).items()
    }
    assert benchmark.other_work(results) == []
    assert [len(rounds[0].turns) for rounds in results.values()] == [2, 2]
    header, _, *lines = benchmark.table(results).splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["| rawloop", "| bare loop"]
    assert len({line.count("|") for line in (header, *lines)}) == 1


def test_other_clipping_is_other_work(benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 3 * benchmark.TURN + 1
    results = {"bare loop": [benchmark.run_round(["bare loop"], steps, tmp_path / "1", benchmark.Work())["bare loop"]]}
    monkeypatch.setattr(benchmark, "MAX_NORM", 0.0)
    results["rawloop"] = [benchmark.run_round(["rawloop"], steps, tmp_path / "2", benchmark.Work())["rawloop"]]
    (complaint,) = benchmark.other_work(results)
    assert complaint.startswith("rawloop ended with the loss")
