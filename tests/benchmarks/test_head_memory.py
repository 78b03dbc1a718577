"""The head in chunks needs less than half of the memory; the benchmark prints its table."""

from typing import Any

import pytest
import torch


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_peak_is_at_most_40_percent(benchmark: Any, trained: bool, dtype: torch.dtype | None) -> None:
    found = benchmark.measure(32_000, 1024, 32, trained=trained, dtype=dtype, rounds=0)
    full, chunked = found["at once"][0], found["in chunks"][0]
    assert full > 2 * 1024 * 32_000 * 4  # logits and their log-softmax
    assert chunked < 0.4 * full


def test_the_table_has_a_line_for_each_case(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--hidden", "16", "--vocabularies", "100", "--targets", "8", "--rounds", "1"]
    assert benchmark.main(sizes) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + 4
