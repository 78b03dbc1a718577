"""Two loops as people write them, and the same loops with rawloop: few lines change, and a resume is bit for bit."""

import difflib
import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rawloop.dist import World
from rawloop.records import read_events

HERE = Path(__file__).parent
MODES = ("fp32", "bf16", "amp_fp16", "native_fp16")
LOOPS = ("gpt", "gan")


def loaded(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines(name: str) -> list[str]:
    return (HERE / f"{name}.py").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("loop", LOOPS)
def test_at_most_fifteen_lines_change(loop: str) -> None:
    """Added or changed; more of the old loop's lines go."""
    changes = list(difflib.unified_diff(lines(f"{loop}_plain"), lines(f"{loop}_rawloop"), n=0))[2:]
    added = [line for line in changes if line.startswith("+")]
    removed = [line for line in changes if line.startswith("-")]
    assert 5 < len(added) <= 15 < len(removed)


@pytest.mark.parametrize("loop", LOOPS)
def test_in_fp32_it_trains_as_the_plain_loop_does(loop: str, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    plain = loaded(f"{loop}_plain").train(str(tmp_path / "plain"), 10, "fp32")
    found = loaded(f"{loop}_rawloop").train(str(tmp_path / "rawloop"), 10, "fp32")
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(plain, found, strict=True))


def stop_and_resume(loop: str, mode: str, folder: Path, start: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    train = loaded(f"{loop}_rawloop").train
    straight = train(str(folder / "straight"), 20, mode)
    train(str(folder / "stopped"), 10, mode)
    torch.manual_seed(99)
    return straight, train(str(folder / "stopped"), 20, mode)


def differ(one: list[Tensor], other: list[Tensor]) -> bool:
    return not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loop", LOOPS)
def test_ten_and_ten_steps_are_twenty(loop: str, mode: str, tmp_path: Path) -> None:
    straight, resumed = stop_and_resume(loop, mode, tmp_path)
    assert not differ(straight, resumed)
    assert differ(straight, loaded(f"{loop}_rawloop").train(str(tmp_path / "short"), 10, mode))
    assert [e["step"] for e in read_events(tmp_path / "stopped") if e["kind"] == "restore"] == [10]


def on_ranks(world: World, loop: str, folder: Path) -> list[Any]:
    return [stop_and_resume(loop, mode, folder / mode) for mode in MODES]


@pytest.mark.slow
@pytest.mark.parametrize("loop", LOOPS)
def test_ten_and_ten_steps_are_twenty_on_two_processes(
    loop: str, run_ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    one, other = run_ranks(on_ranks, loop, tmp_path, timeout=300)
    for (straight, resumed), (there, resumed_there) in zip(one, other, strict=True):
        assert not differ(straight, resumed)
        assert not differ(straight, there)
        assert not differ(resumed, resumed_there)


@pytest.mark.slow
@pytest.mark.parametrize("block", [0, 1, 2], ids=["a loop", "several processes", "a GAN"])
def test_the_pages_loops_run_on_two_processes_and_go_on_when_started_again(block: int, tmp_path: Path) -> None:
    page = (HERE.parent.parent / "docs" / "embedding.md").read_text(encoding="utf-8")
    code = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[block]
    if block != 1:  # the others say nothing of processes
        code = "import torch\n\ntorch.distributed.init_process_group('gloo')\n" + code
        code += "torch.distributed.destroy_process_group()\n"
    (tmp_path / "script.py").write_text(code, encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "script.py"]
    for restored in (False, True):
        done = subprocess.run(launch, cwd=tmp_path, capture_output=True, text=True, timeout=140)
        assert done.returncode == 0, done.stderr[-3000:]
        assert ("[restore]" in done.stderr) == restored
