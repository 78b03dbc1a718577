"""The benchmark of many clips runs: batches come from an index that was built once, whatever starts later."""

from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize("form", ["metadata", "jsonl"])
def test_the_data_are_valid_and_their_codes_complete(
    form: str, benchmark: Any, demo_checkpoint: Path, tmp_path: Path
) -> None:
    from rawloop.components import build_family, read_data

    (tmp_path / "demo").symlink_to(demo_checkpoint)
    folder = tmp_path / "data"
    benchmark.make_data(folder, 30, form)
    config = benchmark.run_config(folder, 0, tmp_path / "run")
    data = read_data(config, build_family(config), "train", "eval")
    assert [len(samples) for samples in data.samples.values()] == [30, benchmark.EVAL]
    (clip,) = data.samples["data.train"][29].audio_paths()
    assert data.cache is not None
    assert data.cache(clip).shape == (benchmark.FRAMES, 8)
    built = sorted(file.suffix for file in (folder / "codes" / "index").iterdir() if file.suffix != ".lock")
    assert built == [".accepted", ".accepted", ".rows", ".samples", ".samples"]


@pytest.mark.slow
def test_starts_are_measured(benchmark: Any, demo_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "demo").symlink_to(demo_checkpoint)
    folder = tmp_path / "data"
    benchmark.make_data(folder, 200, "metadata")
    rows = list(benchmark.starts(folder, 200, [2], 1, 20))
    calls = [float(row.split("|")[-2]) for row in rows]
    assert [row.split("|")[2].strip() for row in rows] == [
        *("2 ranks, the first", "2 ranks, a later one", "2 ranks, resumed at step 40,000")
    ]
    assert calls[0] > 1.0
    assert len({row.count("|") for row in [benchmark.HEAD, *rows]}) == 1
