"""The benchmark itself: all peers train every token once, and one that does not is found out."""

from pathlib import Path
from typing import Any


def test_all_peers_train_every_token_once(benchmark: Any, tmp_path: Path) -> None:
    rows = benchmark.Rows(benchmark.Work(samples=48, median=12, batch=4, hidden=16, layers=1))
    results = {name: [one] for name, one in benchmark.run_round([*benchmark.PEERS], rows, tmp_path).items()}
    assert benchmark.other_work(results, rows) == []
    padding = {name: rounds[0].padding for name, rounds in results.items()}
    assert padding["rawloop, train.max_frames"] < padding["HF Trainer"] / 2
    header, _, *lines = benchmark.table(results).splitlines()
    assert len(lines) == len(benchmark.PEERS)
    assert len({line.count("|") for line in (header, *lines)}) == 1
    short = {"rawloop": [results["HF Trainer"][0]._replace(tokens=5)], "HF Trainer": results["HF Trainer"]}
    (complaint,) = benchmark.other_work(short, rows)
    assert complaint.startswith("rawloop trained 5 tokens")
