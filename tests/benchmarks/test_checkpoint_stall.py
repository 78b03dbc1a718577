"""The stall benchmark runs, and every way of saving leaves its files."""

from pathlib import Path
from typing import Any

import pytest


def test_every_way_is_measured(benchmark: Any, tmp_path: Path) -> None:
    training = benchmark.Training(benchmark.SIZES["lora"])
    peers: dict[str, Any] = {"torch.save": benchmark.BareSave(training, tmp_path)}
    peers |= {name: benchmark.Managed(training, tmp_path / name, name == "later") for name in ("later", "now")}
    for way in peers.values():
        way.save(1)
        way.settle()
        way.close()
    assert (tmp_path / "state.pt").is_file()
    for name in ("later", "now"):
        assert (tmp_path / name / "checkpoints" / "step-00000001" / "MANIFEST.json").is_file()
    assert len(benchmark.slowed(training, tmp_path, 2, 2)) == 2


def test_bad_arguments_are_refused(benchmark: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(["--repetitions", "0"])
