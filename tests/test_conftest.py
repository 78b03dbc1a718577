"""The fixtures that guard the suite can fail: each kind of leak is found, and `run_ranks` brings back what happened."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from rawloop.dist import World
from rawloop.errors import RawloopError, UserError
from tests.forks import Forks

LEAKS = """
import os, subprocess, sys, threading
import torch.distributed as dist

def test_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)

def test_variable():
    os.environ["LEFT_BEHIND"] = "1"

def test_thread():
    threading.Thread(target=threading.Event().wait, args=(3,), name="left_behind").start()

kept = []

def test_child():
    kept.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)  # left_behind"]))

def test_warning():
    import warnings
    warnings.warn("left behind")

def test_clean(tmp_path):
    assert "LEFT_BEHIND" not in os.environ
    assert not dist.is_initialized()
    thread = threading.Thread(target=print)
    thread.start()
    subprocess.run([sys.executable, "-c", ""], check=True)
    assert torch_threads() == 1

def torch_threads():
    import torch
    return torch.get_num_threads()
"""


def test_each_leak_fails_its_test(tmp_path: Path) -> None:
    here = Path(__file__).parent
    shutil.copy(here / "conftest.py", tmp_path)
    source = (tmp_path / "conftest.py").read_text().replace("GRACE = 5.0", "GRACE = 0.5")
    (tmp_path / "conftest.py").write_text(source)
    (tmp_path / "test_leaks.py").write_text(LEAKS)
    command = [sys.executable, "-m", "pytest", "-c", str(here.parent / "setup.cfg"), "--rootdir", str(tmp_path)]
    command += ["-p", "no:cacheprovider", "-p", "no:xdist", "-rEF", str(tmp_path)]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=100, cwd=tmp_path, env={**os.environ, "COLUMNS": "300"}
    )
    output = run.stdout
    for name, leak in {
        "ERROR test_leaks.py::test_group": "a process group",
        "ERROR test_leaks.py::test_variable": "environment variable LEFT_BEHIND='1'",
        "ERROR test_leaks.py::test_thread": "thread left_behind",
        "ERROR test_leaks.py::test_child": "process",
        "FAILED test_leaks.py::test_warning": "left behind",
    }.items():
        (line,) = [line for line in output.splitlines() if line.startswith(name)]
        assert leak in line, output
    assert "1 failed, 5 passed, 4 errors" in output


def sums(world: World, factor: float) -> tuple[int, float, dict[str, str | None]]:
    names = ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS")
    return world.rank, world.sum([factor * (world.rank + 1)])[0], {name: os.environ.get(name) for name in names}


def test_ranks_are_real_and_in_order(run_ranks: Callable[..., list[Any]]) -> None:
    results = run_ranks(sums, 10.0, world_size=2)
    assert [(rank, total) for rank, total, _ in results] == [(0, 30.0), (1, 30.0)]
    assert [names["RANK"] for *_, names in results] == ["0", "1"]
    assert results[0][2]["OMP_NUM_THREADS"] == "1"
    (server,) = (child for child in psutil.Process().children() if "fork_server" in str(child.cmdline()))
    assert server.num_threads() == 1


def one_fails(world: World) -> None:
    if world.rank == 1:
        raise UserError("rank 1 has no data")
    world.sum([1.0])


def test_the_cause_is_raised_and_nobody_is_left_waiting(run_ranks: Callable[..., list[Any]]) -> None:
    started = time.monotonic()
    with pytest.raises(RawloopError, match="rank 1 has no data") as caught:
        run_ranks(one_fails, timeout=60)
    assert any("rank 1" in note for note in caught.value.__notes__)
    assert time.monotonic() - started < 50


def sleeps(world: World) -> None:
    if world.rank == 0:
        time.sleep(60)


def test_a_rank_that_hangs_is_killed(run_ranks: Callable[..., list[Any]]) -> None:
    with pytest.raises(TimeoutError, match="rank 0"):
        run_ranks(sleeps, timeout=3)
    assert not [child for child in psutil.Process().children(recursive=True) if child.ppid() != os.getpid()]


def test_a_forked_program_is_as_one_of_its_own(forks: Forks, tmp_path: Path) -> None:
    (tmp_path / "said.py").write_text("import os, sys; print(sys.argv[1:], os.getcwd(), os.environ['WORD'])")
    for arguments in (["-m", "said"], ["said.py"], ["-c", (tmp_path / "said.py").read_text()]):
        done = forks.run(*arguments, "a", "b", cwd=tmp_path, env={"WORD": "hello"}, check=True)
        assert done.stdout == f"['a', 'b'] {tmp_path} hello\n"
    ends = {"pass": 0, "1 / 0": 1, "sys.exit(3)": 3, "sys.exit('no')": 1, "os.kill(os.getpid(), 9)": -9}
    for code, expected in ends.items():
        for finalize in (False, True):
            done = forks.run("-c", f"import os, sys; {code}", finalize=finalize)
            assert done.returncode == expected, (code, done)
    assert forks.run("-c", "1 / 0").stderr.endswith("ZeroDivisionError: division by zero\n")
    assert forks.run("-c", "import sys; sys.exit('no')").stderr == "no\n"
    atexit = "import atexit; atexit.register(print, 'the end')"
    assert [forks.run("-c", atexit, finalize=value).stdout for value in (False, True)] == ["", "the end\n"]
    started = time.monotonic()
    forever = "import time; print('on', flush=True); time.sleep(100)"
    assert forks.run("-c", forever, timeout=0.5).returncode == -9
    sleeper = forks.start("-c", forever)
    sleeper.wait_for("on")
    os.kill(sleeper.pid, signal.SIGSTOP)
    forks.wait([sleeper])  # nobody else could wake it
    assert time.monotonic() - started < 60
