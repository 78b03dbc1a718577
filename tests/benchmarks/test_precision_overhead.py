"""The overhead benchmark: both sides do the same work, and other work is found out."""

from typing import Any

import pytest


def test_both_sides_do_the_same_work(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["--turns", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[-3:]] == ["| fp32", "| bf16", "| amp_fp16"]


def test_other_work_is_found_out(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    by_policy = benchmark.by_policy
    monkeypatch.setitem(benchmark.SIDES, "policy", lambda mode, model: by_policy(mode, model.requires_grad_(True)))
    assert benchmark.main(["--turns", "3"]) == 1
    assert "nats: the two did other work" in capsys.readouterr().err


def test_bad_arguments_are_refused(benchmark: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(["--turns", "0"])
