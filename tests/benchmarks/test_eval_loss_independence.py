"""The eval_loss benchmark runs: rawloop's number stays, Trainer's moves. Slow; tests/test_evaluate.py has the bound."""

from types import ModuleType

import pytest


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_rawloops_number_stays_and_trainers_moves(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["--steps", "20"]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    spreads = {row[0].removeprefix("| "): float(row[-1].rstrip(" |")) for row in rows}
    assert spreads.pop("rawloop") <= benchmark.BOUND
    assert len(spreads) == 3
    assert all(spread > 1e-3 for spread in spreads.values())


def test_bad_arguments_are_refused(benchmark: ModuleType) -> None:
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(["--steps", "0"])
