"""The convergence benchmark runs, and tells a mode that learns something else."""

from types import ModuleType

import pytest

SMALL = ["--seeds", "1", "--tunings", "full", "--models", "Llama", "--divisors", "16384"]


def test_every_bound_mode_learns_what_fp32_learns(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main([*SMALL, "--steps", "8", "--lrs", "1e-3"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    cells = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]] for row in rows}
    assert {name: values[-1] for name, values in cells.items() if "none" not in name} == {
        "fp32": "16.0",
        "bf16": "16.0",
        "amp_fp16": "16.0",
        "native_fp16, masters": "16.0",
        "bf16, bf16 trainables, masters": "16.0",
        "bf16, bf16 trainables, stochastic": "12.0",
    }
    lost = {name: float(values[-2].rpartition("/")[2].strip(" %")) for name, values in cells.items()}
    assert lost["bf16, bf16 trainables, none"] > 5


def test_a_mode_that_learns_something_else_fails_it(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [benchmark.ROWS[0], benchmark.ROWS[-1]._replace(bound=True)]
    monkeypatch.setattr(benchmark, "ROWS", rows)
    assert benchmark.main([*SMALL, "--steps", "20", "--lrs", "3e-5"]) == 1
    assert "bf16, bf16 trainables, none is 0." in capsys.readouterr().err


def test_bad_arguments_are_refused(benchmark: ModuleType) -> None:
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(["--seeds", "0"])
