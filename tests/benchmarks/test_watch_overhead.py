"""The benchmark itself: both loops do the same work, and each mode has its rows."""

from typing import Any

import pytest

from rawloop import WatchConfig


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
def test_the_watched_loop_does_the_work_of_the_bare_one(benchmark: Any, mode: str) -> None:
    work = benchmark.Work(rows=2, length=8, hidden=64, layers=1, vocab=32, mode=mode)
    times = benchmark.compare(work, steps=4, warm=1, config=WatchConfig(every=3))
    assert len(times.losses) == 5
    assert all(bare == watched for bare, watched in times.losses)
    assert times.probing == [False, False, True, False]
    rows = [*benchmark.lines(work.name, times)]
    assert [row.split(" | ")[1:3] for row in rows[:2]] == [["always on", "3"], ["with a look", "1"]]
    assert len({row.count("|") for row in [*benchmark.HEAD, *rows]}) == 1


def test_each_tool_is_timed(benchmark: Any) -> None:
    work = benchmark.Work(rows=2, length=8, hidden=64, layers=2, vocab=32)
    rows = [*benchmark.tool_costs(work, 1)]
    assert len(rows) == 5
    assert all(float(row.split(" | ")[1]) > 0 for row in rows)
