"""The scripts in launch/: what they refuse, what they hand on, two nodes on one machine, and a whole installation."""

import errno
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from rawloop.cli import main
from rawloop.errors import LostRank, Preempted, RawloopError, UserError
from rawloop.records import TIMES

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch"]
RENDEZVOUS = {"NNODES": "2", "RDZV_ENDPOINT": "node0:29500", "RDZV_ID": "run"}
Done = subprocess.CompletedProcess[str]


def bash(script: Path, *arguments: str, timeout: float = 60, env: dict[str, str] | None = None) -> Done:
    """Run a script; an environment variable that is empty counts as not set."""
    command = ["bash", str(script), *arguments]
    return subprocess.run(command, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=timeout)


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def interpreter(path: Path, version: str) -> Path:
    """Write a command that is this Python, except that it takes itself for another version."""
    numbers = ", ".join(version.split("."))
    code = f"import sys; sys.version_info = ({numbers}, 0); exec(sys.argv[1])"
    return executable(path, f"#!/bin/sh\n[ \"$1\" = -m ] || exec '{sys.executable}' -c '{code}' \"$2\"\n")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder with the launch scripts and the packaging, and no .venv."""
    shutil.copytree(LAUNCH, tmp_path / "tree" / "launch")
    for name in ("setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / "tree")
    return tmp_path / "tree"


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / ".ci" / "run"], ids=lambda script: script.name)
def test_scripts_keep_the_house_rules(script: Path) -> None:
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n# ")
    assert "\nset -euo pipefail\n" in text
    assert os.access(script, os.X_OK)
    assert len(text.splitlines()) <= 100
    assert max(map(len, text.splitlines())) <= 120
    assert not re.search(r"(?<![\w$./}-])/(home|opt|root|tmp|work)/", text), "a path of one machine"
    assert subprocess.run(["bash", "-n", script]).returncode == 0


def test_setup_names_the_python_that_is_too_old(tree: Path) -> None:
    old = interpreter(tree / "bin" / "python3.9", "3.9")
    done = bash(tree / "launch" / "setup.sh", env={"PYTHON": str(old)})
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert f"rawloop needs Python 3.11 or later, found: {old} (3.9)" in line
    assert not (tree / ".venv").exists()


def test_setup_names_a_python_that_is_not_there(tree: Path) -> None:
    done = bash(tree / "launch" / "setup.sh", env={"PYTHON": "python9"})
    assert done.returncode == 2
    assert "found: python9 (does not run)" in done.stderr


@pytest.mark.parametrize(
    ("inside", "wanted", "message"),
    [
        ("3.10", "", ".venv has Python 3.10, rawloop needs 3.11 or later: delete .venv"),
        ("3.11", "3.12", ".venv has Python 3.11, PYTHON names 3.12: delete .venv first"),
    ],
)
def test_setup_deletes_no_venv_that_runs(tree: Path, inside: str, wanted: str, message: str) -> None:
    kept = interpreter(tree / ".venv" / "bin" / "python", inside)
    python = str(interpreter(tree / "bin" / "python", wanted)) if wanted else ""
    done = bash(tree / "launch" / "setup.sh", env={"PYTHON": python})
    assert done.returncode == 2
    assert done.stderr == f"setup: {message}\n"
    assert kept.exists()


@pytest.mark.parametrize("script", ["single_node.sh", "multi_node.sh"])
def test_a_launch_without_config_says_how(script: str) -> None:
    done = bash(LAUNCH / script)
    assert done.returncode == 2
    assert f"bash launch/{script} CONFIG [OVERRIDES...]" in done.stderr


@pytest.mark.parametrize("script", ["single_node.sh", "multi_node.sh"])
def test_a_launch_without_venv_says_what_to_run(script: str, tree: Path) -> None:
    done = bash(tree / "launch" / script, "x.yaml", env={"PYTHON": "", **RENDEZVOUS})
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "bash launch/setup.sh" in line


@pytest.mark.parametrize("name", RENDEZVOUS)
def test_multi_node_names_the_variable_that_is_missing(name: str) -> None:
    done = bash(LAUNCH / "multi_node.sh", "x.yaml", env={**RENDEZVOUS, name: ""})
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"multi_node: {name} is not set")


def test_multi_node_wants_a_port() -> None:
    done = bash(LAUNCH / "multi_node.sh", "x.yaml", env={**RENDEZVOUS, "RDZV_ENDPOINT": "node0"})
    assert done.returncode == 2
    assert "RDZV_ENDPOINT is 'node0', which lacks a port" in done.stderr


@pytest.mark.parametrize(
    ("endpoint", "line"),
    [
        ("no.such:29500", "no.such:29500 cannot be reached: no host has the name 'no.such' here"),
        ("192.0.2.1:29500", "192.0.2.1:29500 cannot be reached: nothing answers there"),  # nobody has this address
        pytest.param(
            "127.0.0.1:{silent}",
            "another program listens at 127.0.0.1:{silent}, and not torch's store: choose another port",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "127.0.0.1:{free}",
            "1 of 2 machines (127.0.0.1) came to 127.0.0.1:{free} in 8 s (JOIN_TIMEOUT): start the same command on the "
            "others, with the same RDZV_ID=run",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["unknown", "nobody", "taken", "alone"],
)
def test_machines_that_do_not_meet_end_with_a_line(endpoint: str, line: str) -> None:
    with socket.socket() as silent, socket.socket() as free:
        for each in (silent, free):
            each.bind(("127.0.0.1", 0))
        silent.listen()
        ports = {"silent": silent.getsockname()[1], "free": free.getsockname()[1]}
        free.close()
        settings = {**RENDEZVOUS, "RDZV_ENDPOINT": endpoint.format(**ports), "NPROC": "1", "PYTHON": sys.executable}
        seconds = "8" if "free" in endpoint else "1"
        start = time.monotonic()
        done = bash(LAUNCH / "multi_node.sh", "x.yaml", env={**settings, "JOIN_TIMEOUT": seconds}, timeout=200)
    assert time.monotonic() - start < 150
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"torchrun: {line.format(**ports)}")


@pytest.mark.slow
def test_a_run_that_has_all_its_machines_takes_no_other(config: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    settings = {"NNODES": "1", "RDZV_ENDPOINT": endpoint, "RDZV_ID": "one", "NPROC": "1", "PYTHON": sys.executable}
    command = ["bash", str(LAUNCH / "multi_node.sh"), str(config), "--output", str(tmp_path / "run")]
    with (tmp_path / "run.log").open("w") as log:
        first = psutil.Popen(
            [*command, "--train.max_steps", "5000"], env={**os.environ, **settings}, stdout=log, stderr=log
        )
    try:
        wait_for_step(tmp_path / "run", 1)
        second = bash(LAUNCH / "multi_node.sh", str(config), "--output", str(tmp_path / "other"), env=settings)
    finally:
        first.terminate()
        first.wait(timeout=100)
    assert second.returncode == 2
    line = "torchrun: the run with RDZV_ID=one trains on all its machines (127.0.0.1): choose another RDZV_ID"
    assert second.stderr.splitlines()[-1] == line
    assert not (tmp_path / "other").exists()


def run_checks(tree: Path, *arguments: str, failing: str = "nothing") -> tuple[list[str], Done]:
    """Run test.sh with a stand-in for .venv's Python that notes its calls; the calls with a word in them fail."""
    executable(tree / "launch" / "setup.sh", "#!/bin/sh\n")
    executable(
        tree / ".venv" / "bin" / "python",
        f'#!/bin/sh\n[ "$1" != -c ] || exec echo 2\nprintf "%s|" "$@" >> {tree}/calls; echo >> {tree}/calls\n'
        f'case "$*" in *{failing}*) exit 3 ;; esac\n',
    )
    done = bash(tree / "launch" / "test.sh", *arguments)
    return [call.strip("|") for call in (tree / "calls").read_text().splitlines()], done


@pytest.mark.parametrize(
    ("arguments", "handed_on"),
    [
        ("", "-m|not slow and not gpu"),
        ("--slow", "-m|not gpu"),
        ("--gpu", "-m|not slow"),
        ("--gpu -x --slow tests/a", "-m||-x|tests/a"),
    ],
)
def test_flags_of_the_checks(tree: Path, arguments: str, handed_on: str) -> None:
    calls, done = run_checks(tree, *arguments.split())
    assert done.returncode == 0, done.stderr
    assert calls == ["-m|ruff|check|.", "-m|ruff|format|--check|.", "-m|mypy", f"-m|pytest|-n|2|{handed_on}"]


@pytest.mark.parametrize("failing", ["check", "format", "mypy", "pytest"])
def test_each_check_can_fail(tree: Path, failing: str) -> None:
    calls, done = run_checks(tree, failing=failing)
    assert done.returncode == 3
    assert failing in calls[-1]


@pytest.fixture
def config(demo_config: Callable[..., Path]) -> Path:
    """A run of 2 steps on the demo checkpoint."""
    return demo_config(train={"max_steps": 2})


@pytest.mark.slow
def test_two_nodes_train_together(config: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    settings = {"NNODES": "2", "RDZV_ENDPOINT": endpoint, "RDZV_ID": "test", "NPROC": "1", "PYTHON": sys.executable}
    command = ["bash", str(LAUNCH / "multi_node.sh"), str(config), "--output", str(tmp_path / "run"), "--seed", "3"]
    logs = [tmp_path / "node0.log", tmp_path / "node1.log"]
    nodes = []
    for log in logs:
        with log.open("wb") as file:
            environment = {**os.environ, **settings}
            nodes.append(subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True))
    try:
        codes = [node.wait(timeout=100) for node in nodes]
    finally:
        for node in nodes:
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)
                node.wait()
    assert codes == [0, 0], "\n".join(log.read_text() for log in logs)
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [event["world_size"] for event in events if event["kind"] == "start"] == [2]
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics if "loss" in line] == [1, 2]
    assert "seed: 3" in (tmp_path / "run" / "config.yaml").read_text()
    assert sorted("trained 2 steps" in log.read_text() for log in logs) == [False, True]


Failure = tuple[int, dict[str, object] | None, int]  # exit code, what it has left, seconds after the first


def cause(line: str, seconds: int = 0, **more: str) -> dict[str, object]:
    return {"message": line, "extraInfo": {"timestamp": str(1000 + seconds), **more}}


OWN = cause("rawloop train: a mistake")
LOST = cause("rawloop train: another rank has ended", 60)
TOLD = cause("rawloop train: stopped by SIGTERM at step 5", 30)
BUG = cause("IndexError: list index out of range", py_callstack="Traceback")


@pytest.mark.parametrize(
    ("failures", "code", "lines"),
    [
        ({0: (2, OWN, 0)}, 2, {0: "failed first: rawloop train: a mistake"}),
        ({0: (1, LOST, 60), 1: (2, OWN, 0)}, 2, {1: "failed first: rawloop train: a mistake"}),
        ({0: (75, TOLD, 30), 1: (2, OWN, 0)}, 2, {1: "failed first: rawloop train: a mistake"}),
        ({0: (75, TOLD, 30), 1: (75, TOLD, 30)}, 75, {1: None, 0: f"has stopped: {TOLD['message']}"}),
        ({0: (1, LOST, 60)}, 1, {0: "failed first: rawloop train: another rank has ended"}),
        (
            {0: (1, LOST, 60), 3: (1, BUG, 0)},
            1,
            {3: f"failed first: {BUG['message']} (its traceback: logs/rank-3.txt of the run folder)"},
        ),
        (
            {0: (1, LOST, 60), 1: (-9, None, 0), 2: (-99, None, 0), 5: (-9, None, 30)},  # 5 did not heed SIGTERM
            1,
            {
                2: "it was killed by signal 99; its output: logs/rank-2.txt of the run folder",
                1: "failed first: it was killed by SIGKILL (out of memory, or pre-empted?); its output: logs/rank-1.t",
            },
        ),
        (
            {0: (-15, None, 0), 1: (3, None, 1)},
            3,
            {1: "failed first: it ended with exit code 3; its output: logs/rank-1.txt of the run folder"},
        ),
        ({0: (-15, None, 0)}, 1, {0: "failed first: it was killed by SIGTERM; its output: above"}),
    ],
)
def test_the_cause_is_the_last_line_and_its_exit_code_counts(
    failures: dict[int, Failure],
    code: int,
    lines: dict[int, str | None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    def fail(arguments: list[str]) -> None:
        found = {}
        for rank, (exit_code, message, seconds) in failures.items():
            file = tmp_path / f"{rank}.json"
            if message is not None:
                file.write_text(json.dumps({"message": message}))
            found[rank] = ProcessFailure(rank, 120 + rank, exit_code, str(file))
            found[rank].timestamp = 1000 + seconds
        raise ChildFailedError("rawloop", found)

    launcher = runpy.run_path(str(LAUNCH / "torchrun.py"))
    monkeypatch.setattr("torch.distributed.run.main", fail)
    monkeypatch.setenv("RAWLOOP_EXIT_CODE_FILE", "")
    assert launcher["run"]([], tmp_path) == code
    told = capsys.readouterr().err.splitlines()
    assert len(told) == len(lines)
    for line, (rank, start) in zip(told, lines.items(), strict=True):
        assert line.startswith(f"torchrun: rank {rank} (process {120 + rank}) {start or ''}")


def test_a_machine_that_misses_another_ends_with_the_cause_of_its_own_workers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch.distributed.elastic.rendezvous import RendezvousConnectionError

    earlier, first, later = cause("of the start before", 0), cause("rawloop train: a mistake", 7), cause("lost", 60)
    for place, message in {"0/0": earlier, "1/0": later, "1/1": first, "1/2": "a text of torch's own"}.items():
        file = tmp_path / "logs" / "test_x" / f"attempt_{place}" / "error.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({"message": message}))

    def fail(arguments: list[str]) -> None:
        (tmp_path / "code").write_text(code)
        raise RendezvousConnectionError("the store is gone")

    launcher = runpy.run_path(str(LAUNCH / "torchrun.py"))
    monkeypatch.setattr("torch.distributed.run.main", fail)
    monkeypatch.setenv("RAWLOOP_EXIT_CODE_FILE", "")
    lines = {
        "2": "torchrun: rank 1 of this machine: rawloop train: a mistake\n",
        "75": "torchrun: another machine has ended; exit code 75 of the workers stands\n",
    }
    for code, line in lines.items():
        assert launcher["run"]([], tmp_path) == int(code)
        assert capsys.readouterr().err == line


def test_an_error_of_torchrun_itself_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(arguments: list[str]) -> None:
        assert arguments == [f"--log-dir={tmp_path}/logs", "--standalone"]
        raise RuntimeError("a bug")

    launcher = runpy.run_path(str(LAUNCH / "torchrun.py"))
    monkeypatch.setattr("torch.distributed.run.main", fail)
    monkeypatch.setenv("RAWLOOP_EXIT_CODE_FILE", "")
    with pytest.raises(RuntimeError, match="a bug"):
        launcher["run"](["--standalone"], tmp_path)


@pytest.mark.parametrize(
    ("left", "number", "code"),
    [("", signal.SIGTERM, 75), ("0", signal.SIGTERM, 75), ("", signal.SIGINT, 130), ("1", signal.SIGTERM, 1)],
)
def test_torchrun_told_to_stop_has_a_line_and_a_code(
    left: str,
    number: signal.Signals,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from torch.distributed.elastic.multiprocessing.api import SignalException

    def fail(arguments: list[str]) -> None:
        if left:
            Path(os.environ["RAWLOOP_EXIT_CODE_FILE"]).write_text(left)
        raise SignalException("got a signal", sigval=number)

    launcher = runpy.run_path(str(LAUNCH / "torchrun.py"))
    monkeypatch.setattr("torch.distributed.run.main", fail)
    monkeypatch.setenv("RAWLOOP_EXIT_CODE_FILE", "")
    assert launcher["run"]([], tmp_path) == code
    (line,) = capsys.readouterr().err.splitlines()
    said = "exit code 1 of the workers stands" if left == "1" else f"stopped by {number.name} before its processes said"
    assert said in line


@pytest.mark.parametrize("moment", ["torchrun imports", "the worker imports"])
def test_sigterm_before_anything_has_begun_ends_with_75(moment: str, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    late = f"open({str(ready)!r}, 'w').close(); time.sleep(60)"
    if moment == "torchrun imports":  # a torch of this test's, which is imported for a minute
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "__init__.py").write_text(f"import time\n{late}\n")
        python = f"PYTHONPATH={tmp_path} exec '{sys.executable}' $1 --standalone x"
    else:
        (tmp_path / "slow.py").write_text(
            "import sys, time\nfrom rawloop.cli import main\n"
            f"class Slow:\n    def find_spec(self, name, path=None, target=None):\n        if name == 'torch': {late}\n"
            "sys.meta_path.insert(0, Slow())\nsys.argv[1:] = ['train']\nsys.exit(main())\n"
        )
        python = f"exec '{sys.executable}' $1 --standalone --nproc-per-node=2 {tmp_path / 'slow.py'}"
    script = executable(tmp_path / "python", f"#!/bin/sh\n{python}\n")
    environment = {**os.environ, "PYTHON": str(script), "NPROC": "2"}
    process = subprocess.Popen(
        ["bash", str(LAUNCH / "single_node.sh"), "x.yaml"], env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 60
        while not ready.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        error = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 75, error
    assert "Traceback" not in error
    assert (
        "torchrun: " if moment == "torchrun imports" else "rawloop train: "
    ) + "stopped by SIGTERM before it" in error


def test_a_process_that_is_killed_is_told_without_a_traceback(tmp_path: Path) -> None:
    worker = executable(
        tmp_path / "worker.py",
        """import os, signal, time
if os.environ["RANK"] == "1":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
""",
    )
    python = executable(
        tmp_path / "python", f"#!/bin/sh\nexec '{sys.executable}' $1 --standalone --nproc-per-node=2 {worker}\n"
    )
    result = bash(LAUNCH / "single_node.sh", "x.yaml", env={"PYTHON": str(python), "NPROC": "2"})
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("torchrun: ")]
    how = r"it was killed by SIGKILL \(out of memory, or pre-empted\?\); its output: logs/rank-1.txt of the run folder"
    assert re.fullmatch(rf"torchrun: rank 1 \(process \d+\) failed first: {how}", line)
    assert result.stderr.endswith(f"{line}\n")
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) < 6, result.stderr


@pytest.mark.parametrize("told", ["os.getpid()", "os.getppid()"], ids=["worker", "torchrun"])
def test_a_worker_told_to_stop_while_it_is_still_importing_learns_of_it(told: str, tmp_path: Path) -> None:
    """Neither it nor torchrun dies of the signal, which may be sent to the one or to the other."""
    worker = executable(
        tmp_path / "worker.py",
        f"""import os, signal, time
from pathlib import Path
os.kill({told}, signal.SIGUSR1)
from rawloop.preempt import watch_signals
with watch_signals(None, Path(os.environ["RAWLOOP_SIGNAL_FILE"])) as preemption:
    deadline = time.monotonic() + 10
    while preemption.wanted() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    Path({str(tmp_path / "told")!r}).write_text(str(preemption.wanted()))
os.kill(os.getpid(), signal.SIGUSR1)
""",
    )
    python = executable(tmp_path / "python", f"#!/bin/sh\nexec '{sys.executable}' $1 --standalone {worker}\n")
    result = bash(LAUNCH / "single_node.sh", "x.yaml", env={"PYTHON": str(python), "NPROC": "1"})
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "told").read_text() == "SIGUSR1"


@pytest.mark.parametrize("script", ["single_node.sh", "multi_node.sh"])
def test_what_the_scripts_hand_to_torchrun(script: str, tmp_path: Path) -> None:
    code = "import signal, sys; print(signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN, *sys.argv[1:])"
    python = executable(tmp_path / "python", f"#!/bin/sh\nexec '{sys.executable}' -c '{code}' \"$@\"\n")
    settings = {"PYTHON": str(python), "NPROC": "1", **RENDEZVOUS}
    plain = bash(LAUNCH / script, "x.yaml", "--optim.lr", "1", env=settings).stdout.split()
    assert plain[:2] == ["True", str(LAUNCH / "torchrun.py")]
    assert "--max-restarts=0" in plain
    assert not [word for word in plain if word.startswith("--shutdown-timeout")]
    assert plain[-7:] == ["-m", "rawloop", "train", "--config", "x.yaml", "--optim.lr", "1"]
    more = bash(LAUNCH / script, "x.yaml", env={**settings, "MAX_RESTARTS": "3", "SHUTDOWN_TIMEOUT": "90"})
    assert {"--max-restarts=3", "--shutdown-timeout=90"} < set(more.stdout.split())


def start_single_node(config: Path, output: Path, **settings: str) -> "psutil.Popen":
    """Start two processes by the script; what they print goes to a file beside the run's folder."""
    command = ["bash", str(LAUNCH / "single_node.sh"), str(config), "--output", str(output)]
    command += ["--train.max_steps", "12", "--checkpoint.save_every", "4", "--data.num_workers", "1"]
    environment = {**os.environ, "NPROC": "2", "PYTHON": sys.executable, **settings}
    with output.with_suffix(".log").open("wb") as log:
        return psutil.Popen(command, env=environment, stdout=log, stderr=log)


def wait_for_step(output: Path, step: int) -> None:
    deadline, metrics = time.monotonic() + 100, output / "metrics.jsonl"
    while not metrics.exists() or f'"step": {step}, "loss"' not in metrics.read_text():
        assert time.monotonic() < deadline, output.with_suffix(".log").read_text()
        time.sleep(0.01)


def metrics_of(output: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_torchrun_stopped_killed_and_restarted(config: Path, tmp_path: Path) -> None:
    whole, stopped, killed = (tmp_path / name for name in ("whole", "stopped", "killed"))
    assert start_single_node(config, whole).wait(timeout=200) == 0
    launcher = start_single_node(config, stopped)
    wait_for_step(stopped, 6)
    launcher.terminate()
    assert launcher.wait(timeout=25) == 75, stopped.with_suffix(".log").read_text()  # before torchrun kills
    said = stopped.with_suffix(".log").read_text()
    (found,) = re.findall(
        r"^rawloop train: stopped by SIGTERM at step (\d+); checkpoint: (.*); continue", said, re.MULTILINE
    )
    assert 6 <= int(found[0]) < 12
    assert (Path(found[1]) / "MANIFEST.json").is_file()

    launcher = start_single_node(config, killed, MAX_RESTARTS="1")
    wait_for_step(killed, 6)
    workers = [child for child in launcher.children() if "rawloop" in child.cmdline()]
    assert len(workers) == 2
    workers[1].kill()
    assert launcher.wait(timeout=200) == 0, killed.with_suffix(".log").read_text()
    assert "resumed from " in killed.with_suffix(".log").read_text()
    assert metrics_of(killed) == metrics_of(whole)
    final = "checkpoints/step-00000012/adapter/adapter_model.safetensors"
    assert (killed / final).read_bytes() == (whole / final).read_bytes()


@pytest.fixture
def clone(tree: Path) -> Iterator[Path]:
    """What a fresh clone holds: the files that git knows, or would add."""
    listed = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    yield tree
    shutil.rmtree(tree)  # gigabytes


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_installation_in_a_fresh_clone(clone: Path) -> None:
    setup, python = clone / "launch" / "setup.sh", clone / ".venv" / "bin" / "python"
    # Killed in the middle of copying packages: the half of them that is there must not be taken for whole.
    with (clone / "log").open("w+") as log:
        (clone / "tmp").mkdir()  # a killed pip does not tidy up
        environment = {**os.environ, "TMPDIR": str(clone / "tmp")}
        first = subprocess.Popen(["bash", setup], env=environment, stdout=log, stderr=log, start_new_session=True)
        while "Installing collected packages" not in (clone / "log").read_text() and first.poll() is None:
            time.sleep(0.1)
        time.sleep(2)
        os.killpg(first.pid, signal.SIGKILL)
        assert first.wait() == -signal.SIGKILL, (clone / "log").read_text()
    done = bash(setup, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "making .venv" in done.stdout

    started = time.monotonic()
    again = bash(setup)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert time.monotonic() - started < 3

    # A library that does not fit, as PyPI's torchaudio has beside many builds of torch: noticed, and mended.
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", where], capture_output=True, text=True, check=True).stdout.strip()
    for name in ("_torchaudio.abi3.so", "libtorchaudio.abi3.so", "libtorchaudio.so"):
        Path(site, "torchaudio", "lib", name).write_bytes(b"no library")
    assert subprocess.run([python, "-c", "import torchaudio"], capture_output=True).returncode == 1
    done = bash(setup, timeout=300)
    assert done.returncode == 0, done.stderr
    check = "import torchaudio.functional as f, torch; print(f.resample(torch.zeros(480), 48000, 24000).shape)"
    assert "240" in subprocess.run([python, "-c", check], capture_output=True, text=True).stdout

    # From there to a trained model, in few steps.
    done = bash(clone / "launch" / "quickstart.sh", "--train.max_steps", "4", "--evaluation.every", "2", timeout=600)
    assert done.returncode == 0, done.stderr
    assert "trained 4 steps" in done.stdout
    (run,) = (clone / "runs").iterdir()
    assert {"config.yaml", "metrics.jsonl", "events.jsonl", "checkpoints", "best", "hello.wav"} <= {
        file.name for file in run.iterdir()
    }


@pytest.mark.parametrize(
    ("error", "line", "later"),
    [
        (KeyError("a\nbug"), "KeyError: 'a\\nbug'", 0),
        (UserError("a mistake\nin two lines"), "rawloop verify: a mistake in two lines", 0),
        (Preempted("stopped"), "rawloop verify: stopped", 30),
        (LostRank("another"), "rawloop verify: another; what was saved is whole", 60),
        (OSError(errno.ENOSPC, "full"), "rawloop verify: no space is left on the disk", 0),
    ],
)
def test_a_process_that_fails_leaves_its_cause_for_torchrun(
    error: Exception, line: str, later: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(arguments: list[str]) -> None:
        raise error

    monkeypatch.setattr("rawloop.cli.verify.run", fail)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error"))
    before = int(time.time())
    if isinstance(error, KeyError):
        with pytest.raises(KeyError):
            main(["verify", "run"])
    else:
        assert main(["verify", "run"]) == (error.exit_code if isinstance(error, RawloopError) else 1)
    message = json.loads((tmp_path / "error").read_text())["message"]
    assert message["message"] == line
    assert before <= int(message["extraInfo"]["timestamp"]) - later <= time.time()
    assert message["extraInfo"].get("py_callstack", "").startswith("Traceback" if isinstance(error, KeyError) else "")
