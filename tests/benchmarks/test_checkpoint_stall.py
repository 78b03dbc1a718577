"""The stall benchmark runs, and every way of saving leaves its files."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("checkpoint_stall", Path(__file__).with_name("checkpoint_stall.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
