"""The files for clusters in launch/: what they name exists, and their commands train, are stopped, and go on."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from rawloop.config import parse
from rawloop.records import TIMES

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
RUN = "/data/runs/voice"
CONFIG = "configs/higgs_lora.yaml"


def loaded(name: str) -> Any:
    return yaml.safe_load((LAUNCH / name).read_text(encoding="utf-8"))


def pods() -> list[Any]:
    specs = loaded("kubernetes.yaml")["spec"]["pytorchReplicaSpecs"]
    assert list(specs) == ["Master", "Worker"]
    return [specs[name] for name in specs]


def container() -> Any:
    (found,) = pods()[0]["template"]["spec"]["containers"]
    return found


def test_kubernetes_pods_are_alike_restarted_and_keep_the_run_on_a_volume() -> None:
    first, second = pods()
    assert first["template"] == second["template"]
    assert first["restartPolicy"] == second["restartPolicy"] == "OnFailure"
    spec = first["template"]["spec"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in container()["volumeMounts"]}
    assert "persistentVolumeClaim" in volumes[mounts["/data"]]
    assert "/dev/shm" in mounts
    seconds = {env["name"]: env["value"] for env in container()["env"]}["SHUTDOWN_TIMEOUT"]
    assert int(seconds) < spec["terminationGracePeriodSeconds"]


def commands() -> dict[str, str]:
    """The command of each file, in a line."""
    run = loaded("skypilot.yaml")["run"]
    sbatch = re.search(r"sbatch (launch/slurm.sbatch .*?) {2,}", (LAUNCH / "slurm.sbatch").read_text())
    assert sbatch
    return {
        "kubernetes": " ".join([*container()["command"], *container()["args"]]),
        "skypilot": run.strip().splitlines()[-1].removeprefix("exec "),
        "slurm": f"bash {sbatch[1]}",
    }


@pytest.mark.parametrize("name", commands())
def test_what_the_commands_name_exists(name: str) -> None:
    program, script, config, *options = commands()[name].split()
    assert program == "bash"
    assert (ROOT / script).is_file()
    assert (ROOT / config).is_file()
    parsed = parse(["--config", str(ROOT / config), *options], "rawloop train").config
    assert parsed.output.endswith("runs/voice")
    assert parsed.resume == (None if name == "slurm" else "auto")  # the script adds it


def test_the_variables_are_those_that_the_scripts_know() -> None:
    known = "".join((LAUNCH / name).read_text() for name in ("multi_node.sh", "single_node.sh"))
    set_here = [env["name"] for env in container()["env"]]
    set_here += re.findall(r"\b([A-Z_]+)=", loaded("skypilot.yaml")["run"])
    set_here += re.findall(r"\b([A-Z_]+)=", (LAUNCH / "slurm.sbatch").read_text())
    assert len(set_here) > 10
    assert [
        name for name in set_here if not re.search(rf"\$\{{?!?{name}\b|^#   .*\b{name}\b", known, re.MULTILINE)
    ] == []


def test_skypilot_starts_again_what_was_stopped() -> None:
    resources = loaded("skypilot.yaml")["resources"]
    assert resources["job_recovery"]["recover_on_exit_codes"] == [75]
    assert [*loaded("skypilot.yaml")["volumes"]] == ["/data"]
    setup = loaded("skypilot.yaml")["setup"].strip()
    assert (ROOT / setup.removeprefix("bash ")).is_file()


def test_slurm_reads_its_settings_before_the_first_command() -> None:
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    settings = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert settings
    assert max(settings) < first
    given = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if line.startswith("#SBATCH"))
    limit = re.search(r"SHUTDOWN_TIMEOUT:-(\d+)", "\n".join(lines))
    assert limit
    assert int(limit[1]) < int(given["signal"].removeprefix("B:USR1@"))
    assert {"requeue", "open-mode"} <= set(given)


# -- they train --------------------------------------------------------------------------------------------------


@pytest.fixture
def config(demo_config: Callable[..., Path]) -> Path:
    """A run of 60 steps on the demo checkpoint, on one machine; each step takes a tenth of a second."""
    return demo_config(train={"max_steps": 60}, checkpoint={"save_every": 20}, evaluation={"every": 1000})


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "PYTHON": sys.executable, "NPROC": "1", **more}


def metrics_of(output: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def final(output: Path) -> bytes:
    return (output / "checkpoints/step-00000060/adapter/adapter_model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_batch_script_saves_on_sigusr1_and_goes_on_to_the_same_weights(config: Path, tmp_path: Path) -> None:
    """Its own trap and exit code, without SLURM: the signal goes to the shell alone, as `--signal=B:USR1` sends it."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"

    def start(output: Path) -> "psutil.Popen":
        command = ["bash", str(LAUNCH / "slurm.sbatch"), str(config), "--output", str(output)]
        with (tmp_path / "log").open("a") as log:
            return psutil.Popen(command, env=environment(tmp_path, NPROC="2"), stdout=log, stderr=log)

    assert start(whole).wait(timeout=200) == 0, (tmp_path / "log").read_text()
    script = start(stopped)
    deadline = time.monotonic() + 200
    while not (stopped / "checkpoints" / "step-00000020").is_dir():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    script.send_signal(signal.SIGUSR1)
    assert script.wait(timeout=100) == 75, (tmp_path / "log").read_text()
    assert "stopped by SIGUSR1 at step " in (tmp_path / "log").read_text()
    assert not (stopped / "checkpoints" / "step-00000060").exists()
    assert start(stopped).wait(timeout=200) == 0
    assert "resumed from " in (tmp_path / "log").read_text()
    assert metrics_of(stopped) == metrics_of(whole)
    assert final(stopped) == final(whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kubernetes", "skypilot"])
def test_the_commands_train_with_what_the_cluster_sets(config: Path, tmp_path: Path, name: str) -> None:
    """On one machine, with the variables that its operator sets; only the config and the paths are this test's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    if name == "kubernetes":
        command = commands()[name]
        env = {one["name"]: one["value"] for one in container()["env"]}
        env |= {"PET_NNODES": "1", "PET_MASTER_ADDR": "localhost", "PET_MASTER_PORT": port, "PET_NODE_RANK": "0"}
        env |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "1", "RANK": "0"}
    else:
        command = loaded("skypilot.yaml")["run"].replace(":29500", f":{port}")
        env = {
            "SKYPILOT_NUM_NODES": "1",
            "SKYPILOT_NODE_IPS": "127.0.0.1",
            "SKYPILOT_TASK_ID": "sky-2026-12-01_voice-1-0",
        }
    command = command.replace(CONFIG, f"{config} --train.max_steps 2").replace(RUN, str(tmp_path / "run"))
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=ROOT,
        env={**environment(tmp_path), **env, "PYTHON": sys.executable},
        timeout=200,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "trained 2 steps" in done.stdout
