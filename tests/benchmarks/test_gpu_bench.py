"""The GPU check goes its whole way on the CPU, says where a GPU is missing, and fails where a part of it fails."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks import gpu_bench, loop_overhead

ROOT = Path(__file__).parent.parent.parent
WITHOUT = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def check(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    command = ["bash", "launch/gpu_check.sh", *map(str, arguments)]
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_a_rehearsal_runs_tests_and_all_sections_and_writes_both_files(tmp_path: Path) -> None:
    done = check("--cpu", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    assert (found["errors"], found["cut_short"]) == ({}, [])
    assert found["tests"]["passed"] >= 2
    assert (found["tests"]["failed"], found["tests"]["skipped"]) == (0, 0)  # bitsandbytes is found, too
    for name in gpu_bench.SECTIONS:
        assert found[name], name
    assert {row["mode"] for row in found["by_mode"]} == set(gpu_bench.MODES)
    assert [row["loop"] for row in found["by_size"]] == 2 * ["HF Trainer", "bare loop", "rawloop"]
    text = (tmp_path / "out" / "gpu_check.md").read_text()
    assert "**A rehearsal on the CPU" in text
    assert text.count("\n## ") == len(gpu_bench.SECTIONS)
    assert "| tiny LoRA | rawloop | bf16 | 2 x 8 |" in text


@WITHOUT
def test_without_a_gpu_it_says_so_and_does_nothing(tmp_path: Path) -> None:
    done = check(tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert "gpu_check: no GPU on this machine" in done.stderr
    assert "--cpu" in done.stderr
    assert not (tmp_path / "out").exists()
    assert check("--gpu").returncode == 2


@WITHOUT
def test_the_benchmark_alone_says_so_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_bench.main(["--output", str(tmp_path)]) == 2
    assert "gpu_bench: no GPU: torch.cuda.is_available() is false" in capsys.readouterr().err


def test_a_failing_section_and_one_without_time_are_reported_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(plan: gpu_bench.Plan) -> Iterator[gpu_bench.Row]:
        yield {"a": 1, "b": None}
        raise RuntimeError("broken on purpose")

    def whole(plan: gpu_bench.Plan) -> Iterator[gpu_bench.Row]:
        yield {"a": 2, "b": 0.5}

    monkeypatch.setattr(gpu_bench, "SECTIONS", {"loop": ("First", broken), "saves": ("Second", whole)})
    assert gpu_bench.main(["--cpu", "--output", str(tmp_path), "--tests", str(tmp_path / "none.xml")]) == 1
    text = (tmp_path / "gpu_check.md").read_text()
    assert "RuntimeError: broken on purpose" in text
    assert "| 1 | - |" in text
    assert "| 2 | 0.5 |" in text
    assert "1 failed" in text
    assert "wrote no result" in text
    assert gpu_bench.main(["--cpu", "--output", str(tmp_path), "--seconds", "0"]) == 0
    assert json.loads((tmp_path / "gpu_check.json").read_text())["cut_short"] == ["loop", "saves"]


def test_operations_are_those_of_the_formula() -> None:
    size = gpu_bench.Size(8, 2, 2, 16, 10, lora=0)
    layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16 + 2 * 8  # query, key and value of one head, output, MLP, two norms
    weights = 2 * layer + 8 + 10 * 8  # the last norm, and the head
    assert gpu_bench.operations_per_token(size, 5) == 6 * weights + 6 * 2 * 5 * 8
    lora = 2 * (4 * 8 + 2 * 4 + 2 * 8 + 3 * (8 + 16))  # in and out of seven matrices, of rank 1
    with_lora = gpu_bench.operations_per_token(size._replace(lora=1), 5)
    assert with_lora == 4 * weights + 6 * lora + 6 * 2 * 5 * 8


def test_a_token_of_higgs_uses_one_of_two_mlps() -> None:
    size = gpu_bench.HiggsSize(48, 2, 3, 64, 64, 64, lora=1)
    shared, mlp = 48 * (48 + 16 + 16) + 48 * 48, 3 * 48 * 64 + 2 * 48  # attention of one key head; an MLP and two norms
    weights = 2 * (shared + mlp) + 48 + 8 * 64 * 48  # the last norm, and the heads of eight codebooks
    lora = 2 * (2 * (48 + 48) + 2 * (48 + 16) + 3 * (48 + 64)) + 48 + 8 * 64
    assert gpu_bench.operations_per_token(size, 8) == 4 * weights + 6 * lora + 6 * 2 * 8 * 48


def test_the_batch_is_halved_until_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    run_round = loop_overhead.run_round

    def small_memory(names: Any, steps: Any, folder: Any, work: loop_overhead.Work, build: Any) -> Any:
        tried.append(work.batch)
        if work.batch > 2:
            raise torch.OutOfMemoryError("too large")
        return run_round(names, steps, folder, work, build)

    monkeypatch.setattr(loop_overhead, "run_round", small_memory)
    plan = replace(gpu_bench.REHEARSAL, batch=8)
    row = gpu_bench.speed(plan, "tiny", plan.by_size["tiny LoRA"], "rawloop", "fp32")
    assert tried == [8, 4, 2]
    assert row["batch"] == "2 x 8"
