"""The benchmark of updates runs, and measures each way."""

import pytest

from tests.benchmarks.rounding_time import ROWS, main


def test_it_prints_a_line_for_each_way(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--rounds", "1", "--matrices", "2", "--size", "64", "--optimizers", "adamw"])
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines] == [["adamw", row] for row in ROWS]
    assert all(0 < float(least) <= float(median) for *_, least, median in lines)
