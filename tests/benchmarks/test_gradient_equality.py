"""However a window is cut up, its gradient is the same to rounding: most of the table, and slowly all of it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rawloop.config import RunConfig
from rawloop.dist import World
from rawloop.loop import accumulate


@pytest.fixture(scope="module")
def runs(benchmark: Any, demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunConfig]:
    made: dict[str, RunConfig] = benchmark.make_runs(demo_checkpoint, tmp_path_factory.mktemp("gradients"))
    return made


@pytest.fixture(scope="module")
def few(benchmark: Any) -> dict[str, list[Any]]:
    """The layouts in which batches differ most: single samples, pairs in order of length, and packed rows."""
    wanted = {(1, 8, "padded"), (8, 1, "bucketed"), (2, 4, "bucketed"), (8, 1, "packed"), (2, 4, "packed")}
    return {
        family: [layout for layout in benchmark.layouts(family) if tuple(layout) in wanted]
        for family in benchmark.FAMILIES
    }


def check(benchmark: Any, cells: list[Any], dtypes: Sequence[str] = ("float64", "float32")) -> None:
    assert benchmark.too_far(cells) == []
    assert all(cell.measured.difference > 0 for cell in cells)  # they round differently: not the same thing twice
    for dtype in dtypes:
        padding = [cell.measured.padding for cell in cells if cell.dtype == dtype]
        assert min(padding) == 0
        assert max(padding) > 0.25


@pytest.mark.parametrize("family", [pytest.param("higgs_audio_v2", marks=pytest.mark.slow), "causal_lm", "audio_chat"])
def test_one_process(benchmark: Any, runs: dict[str, RunConfig], few: dict[str, list[Any]], family: str) -> None:
    cells = benchmark.measure_all(World(), {family: runs[family]}, few)
    assert len(cells) == 2 * len(few[family])
    check(benchmark, cells)


@pytest.mark.slow  # tests/test_loop.py has one case of it
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes(
    benchmark: Any,
    runs: dict[str, RunConfig],
    few: dict[str, list[Any]],
    run_ranks: Callable[..., list[Any]],
    parallel: Any,
) -> None:
    chosen = {family: replace(config, parallel=parallel) for family, config in runs.items()}
    first, second = run_ranks(benchmark.measure_all, chosen, few)
    dtypes = ("float64", "float32") if parallel == "ddp" else ("float32",)
    assert first == second
    assert len(first) == len(dtypes) * sum(map(len, few.values()))
    check(benchmark, first, dtypes)


def test_a_window_that_is_a_mean_of_means_is_found_out(
    benchmark: Any, runs: dict[str, RunConfig], few: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What most loops do: each micro-batch's loss is the mean over its own targets, divided by their number."""

    def own_counts(run: Any, window: list[Any], targets: Any) -> None:
        for batch in window:
            accumulate(run, [batch], {s: n * len(window) for s, n in batch.targets.items()})

    monkeypatch.setattr(benchmark, "accumulate", own_counts)
    cells = benchmark.measure_all(World(), {"causal_lm": runs["causal_lm"]}, few)
    wrong = {cell.layout.accumulation > 1 for cell in cells if benchmark.too_far([cell])}
    assert wrong == {True}
    assert len(benchmark.too_far(cells)) == 6  # three layouts of several micro-batches, in two dtypes


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_whole_table(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main([]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + sum(len(benchmark.layouts(family)) for family in benchmark.FAMILIES)
