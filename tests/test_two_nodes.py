"""Two machines, as two network namespaces with a cable between them: lost, replaced, cut off, and different.

No machine can resolve the other's name, nor its own, and 127.0.0.1 is not the other machine: what works here needs
nothing set. Root and `ip` (iproute2) are needed; without them these tests are skipped.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from rawloop.records import TIMES

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
ENDPOINT = "10.77.0.1:29500"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Nodes:
    """Two machines. `start` starts the script on one of them; what it prints goes to `node-N.log`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = [f"rl{os.getpid()}n{number}" for number in (0, 1)]
        self.cables = [f"rl{os.getpid()}v{number}" for number in (0, 1)]  # at most 15 letters

    def build(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
        (first, second), (one, other) = self.names, self.cables
        ip("link", "add", one, "netns", first, "type", "veth", "peer", "name", other, "netns", second)
        for number, (name, cable) in enumerate(zip(self.names, self.cables, strict=True), start=1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", cable)
            ip("-n", name, "link", "set", cable, "up")
            ip("-n", name, "link", "set", "lo", "up")

    def cut(self) -> None:
        """Pull the cable."""
        ip("-n", self.names[1], "link", "set", self.cables[1], "down")

    def start(self, number: int, *arguments: str | Path, before: str = "", **settings: str) -> "psutil.Popen":
        """Start multi_node.sh; `before` are commands for the shell, such as a mount that only this machine has."""
        script = f'hostname node{number}; {before or ":"}; exec bash {LAUNCH}/multi_node.sh "$@"'
        spaces = ["ip", "netns", "exec", self.names[number], "unshare", "--uts", "--mount"]
        fixed = {"NNODES": "2", "RDZV_ENDPOINT": ENDPOINT, "RDZV_ID": "test", "NPROC": "1", "PYTHON": sys.executable}
        with (self.folder / f"node-{number}.log").open("ab") as log:
            return psutil.Popen(
                [*spaces, "sh", "-ec", script, "sh", *map(str, arguments)],
                env={**os.environ, **fixed, **settings},
                stdout=log,
                stderr=log,
            )

    def said(self, number: int) -> list[str]:
        return (self.folder / f"node-{number}.log").read_text(errors="replace").splitlines()

    def destroy(self) -> None:
        for name in self.names:
            found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
            for pid in map(int, found.stdout.split()):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    """Two machines that see each other."""
    if not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("there is no `ip` here: apt-get install iproute2")
    if os.getuid() != 0:
        pytest.skip("network namespaces need root")
    made = Nodes(tmp_path)
    try:
        made.build()
    except subprocess.CalledProcessError as error:
        made.destroy()
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
    yield made
    made.destroy()


@pytest.fixture
def config(demo_config: Callable[..., Path]) -> Path:
    """A run of 12 steps on the demo checkpoint, saved at every fourth."""
    return demo_config(train={"max_steps": 12}, checkpoint={"save_every": 4}, evaluation={"every": 100})


def wait_for(what: Callable[[], bool], seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def kill_tree(process: "psutil.Popen") -> None:
    for each in [*process.children(recursive=True), process]:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait(timeout=60)


def metrics_of(output: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def final_weights(output: Path) -> bytes:
    return (output / "checkpoints/step-00000012/adapter/adapter_model.safetensors").read_bytes()


def test_a_machine_that_is_killed_and_replaced_changes_nothing(nodes: Nodes, config: Path, tmp_path: Path) -> None:
    """Its whole tree is killed in the middle, the other machine waits, and the run ends like an undisturbed one."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = ["bash", str(LAUNCH / "single_node.sh"), str(config), "--output", str(whole)]
    alone = {**os.environ, "NPROC": "2", "PYTHON": sys.executable}
    subprocess.run(command, env=alone, check=True, capture_output=True, timeout=200)
    both = [nodes.start(number, config, "--output", killed, MAX_RESTARTS="2") for number in (0, 1)]
    wait_for((killed / "checkpoints" / "step-00000008").is_dir)
    kill_tree(both[1])
    both[1] = nodes.start(1, config, "--output", killed, MAX_RESTARTS="2")
    assert [node.wait(timeout=200) for node in both] == [0, 0], nodes.said(0)[-20:]
    assert any(line.startswith("resumed from ") for line in nodes.said(0) + nodes.said(1))
    assert metrics_of(killed) == metrics_of(whole)
    assert final_weights(killed) == final_weights(whole)
    logs = (killed / "logs" / "rank-1.txt").read_text()
    assert logs.count("--- rank 1 on node") == 2


def test_a_cut_cable_ends_both_machines_and_the_missing_rank_is_named(
    nodes: Nodes, config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    options: list[str | Path] = ["--output", run, "--train.max_steps", "5000", "--ddp.timeout", "10"]
    both = [nodes.start(number, config, *options) for number in (0, 1)]
    wait_for((run / "checkpoints" / "step-00000008").is_dir)
    nodes.cut()
    start = time.monotonic()
    assert [node.wait(timeout=300) for node in both] == [1, 1]
    assert time.monotonic() - start < 280  # the network itself gives up after a quarter of an hour
    (hosts,) = [number for number in (0, 1) if "10.77.0.1" not in nodes.said(number)[-1]]
    assert "did not come in time: the others waited 10 s (ddp.timeout)" in nodes.said(hosts)[-1]
    assert nodes.said(1 - hosts)[-1].startswith(f"torchrun: the machine of {ENDPOINT} does not answer any more")


def test_machines_that_differ_are_told_in_one_table(nodes: Nodes, config: Path, tmp_path: Path) -> None:
    """Another version of the code, another setting, other data, and an output that only one machine can write."""
    shutil.copytree(ROOT / "rawloop", tmp_path / "other" / "rawloop")
    with (tmp_path / "other" / "rawloop" / "loop.py").open("a") as file:
        file.write("# another version\n")
    data = json.loads(config.read_text())["data"]
    output = tmp_path / "runs"
    output.mkdir()
    options: list[str | Path] = ["--output", output / "run", "--seconds", "60"]
    read_only = f"mount --bind {output} {output}; mount -o remount,bind,ro {output}"
    differs = ["--optim.lr", "0.5", "--data.eval", data["train"]]
    before = f"{read_only}; cd {tmp_path}/other"  # python takes rawloop from there
    both = [
        nodes.start(0, config, *options, COMMAND="launch-check"),
        nodes.start(1, config, *options, *differs, before=before, COMMAND="launch-check"),
    ]
    assert [node.wait(timeout=200) for node in both] == [2, 2]
    said = [*nodes.said(0), *nodes.said(1)]
    wrong = {line.split()[1]: line for line in said if line.startswith(("DIFFERS", "FAILED"))}
    assert set(wrong) == {"rawloop's", "optim.lr", "data.eval", "output"}, said
    assert "nothing can be written into" in wrong["output"]
    assert "Read-only file system" in wrong["output"]
    line = "rawloop launch-check: 4 of 13 checks failed: rawloop's source, optim.lr, data.eval, output: start every"
    for number in (0, 1):
        assert line in nodes.said(number)[-1]
        assert nodes.said(number)[-1].startswith("torchrun: rank ")


@pytest.mark.parametrize("how", ["settings", "read-only"])
def test_training_refuses_machines_that_differ(nodes: Nodes, config: Path, tmp_path: Path, how: str) -> None:
    output = tmp_path / "runs"
    output.mkdir()
    read_only = f"mount --bind {output} {output}; mount -o remount,bind,ro {output}" if how == "read-only" else ""
    more = ["--optim.lr", "0.5"] if how == "settings" else []
    options: list[str | Path] = ["--output", output / "run"]
    both = [nodes.start(0, config, *options), nodes.start(1, config, *options, *more, before=read_only)]
    assert [node.wait(timeout=200) for node in both] == [2, 2]
    line = (
        "the ranks differ: rank 1 has optim.lr "
        if how == "settings"
        else f"output is '{output}/run', and node1 cannot "
    )
    for number in (0, 1):
        assert line in nodes.said(number)[-1], nodes.said(number)
    assert not (output / "run" / "events.jsonl").exists()
