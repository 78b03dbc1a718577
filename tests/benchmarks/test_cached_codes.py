"""The benchmark of cached codes runs, and both ways make the same batches."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from rawloop.data.batches import Draw, MicroBatches


@pytest.mark.slow
def test_both_ways_train_on_the_same_batches(benchmark: Any, demo_checkpoint: Path, tmp_path: Path) -> None:
    work = benchmark.Work(demo_checkpoint, tmp_path, full=False)
    made = [
        MicroBatches(work.samples, partial(work.family.example, codes=codes), work.family.collate).made([Draw(3, 0)])[1]
        for codes in work.ways.values()
    ]
    for name, tensor in made[0].inputs.items():
        torch.testing.assert_close(made[1].inputs[name], tensor, rtol=0, atol=0)
    found = benchmark.measure(work, 1)
    *rows, ratios = benchmark.lines_of("the demo's", found, work.seconds)
    assert [row.split("|")[2].strip() for row in rows] == ["cached", "on the fly"]
    assert float(ratios.split("|")[3]) > 1.0
