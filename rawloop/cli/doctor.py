"""`rawloop doctor` measures, on the user's model and data, whether a config trains correctly on this machine.

It trains a few steps in a temporary folder and writes nothing else. It costs the loading of the model a few times.
"""

import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from os.path import expanduser
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from rawloop.audio import import_torchaudio
from rawloop.build import check_run
from rawloop.checkpoint.disk import readable
from rawloop.checkpoint.slots import find_slots
from rawloop.cli import read_config
from rawloop.cli.grouping import NOT_FINITE, STEPS, compare, measure, small
from rawloop.config import RunConfig, to_yaml
from rawloop.diagnose.checks import Check, Report
from rawloop.dist import World, open_world
from rawloop.errors import RawloopError, UserError

FIRST_ROW = "data, model, first pass"
CHECKS = ("label census", "first loss", "causality probe")  # in the order of `Report.events`
NOT_JUDGED = "not judged: what the first pass gives is not finite"
PATIENCE = 600.0  # seconds for a process that the doctor starts


def run(argv: list[str]) -> None:
    """Examine a config and print a table. A failed check is an error."""
    config, options = read_config("doctor", argv)
    with open_world(config.device, config.ddp.timeout) as world:
        if options["part"] is not None:
            measure(config, world, Path(options["part"]))
            return
        if world.size > 1:
            raise UserError("rawloop doctor starts its own processes: call it without torchrun")
        with tempfile.TemporaryDirectory(prefix="rawloop-doctor-") as folder:
            findings = list(Doctor(config, world, Path(folder)).examine())
    failed = [finding.check for finding in findings if finding.result == "FAILED"]
    if failed:
        raise RawloopError(f"{len(failed)} of {len(findings)} checks failed: {', '.join(failed)}")


class Finding(NamedTuple):
    """One row of the table."""

    check: str
    result: Literal["passed", "FAILED", "skipped"]
    found: str


class Skipped(RawloopError):
    """A check that this machine cannot do, or whose result cannot be judged."""


class Doctor:
    """The checks of a config. Each is a method that returns its finding, or raises a RawloopError with it."""

    def __init__(self, config: RunConfig, world: World, folder: Path) -> None:
        self.config, self.world, self.folder = config, world, folder
        self.report: Report | None = None  # of the checks before step 0

    def examine(self) -> Iterator[Finding]:
        """Yield the findings one by one, printing each. A check that needs a failed one is skipped."""
        checks: dict[str, Callable[[], str]] = {
            "environment": self.environment,
            FIRST_ROW: self.first_pass,
            CHECKS[0]: self.labels,
            CHECKS[1]: self.first_loss,
            CHECKS[2]: self.causality,
            "4 x 1 equals 1 x 4": self.equal_groupings,
            "2 processes equal 1": self.equal_processes,
            "killed and resumed, bit for bit": self.killed_and_resumed,
        }
        blocked = ""  # why the later checks are not judged
        for name, check in checks.items():
            skipped = blocked and not (blocked == NOT_JUDGED and name in CHECKS)
            finding = Finding(name, "skipped", blocked) if skipped else outcome(name, check)
            if finding.result == "FAILED" and name == FIRST_ROW:
                blocked = NOT_JUDGED if finding.found.startswith(NOT_FINITE) else "mend what failed first"
            print(f"{finding.result:<8} {finding.check:<34} {finding.found}", flush=True)
            yield finding

    def environment(self) -> str:
        """Versions, device, bfloat16, torchaudio, and free space for the run folder."""
        import_torchaudio()
        names = ("torch", "transformers", "peft", "torchaudio")
        versions = ", ".join(f"{name} {version(name)}" for name in names)
        device = str(self.world.device)
        if self.world.device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
            name = torch.cuda.get_device_name(self.world.device)
            device = f"{name}, bfloat16 {'native' if native else 'not native'}"
        output = self.config.output
        existing = Path(expanduser(output)).absolute()
        while not existing.exists():
            existing = existing.parent
        free = readable(shutil.disk_usage(existing).free)
        return f"Python {platform.python_version()}, {versions}; {device}; {free} free for {output}"

    def first_pass(self) -> str:
        """Read, load, and run one window forward and backward as 4 x 1; the other groupings are compared with it.

        A loss or gradient that is not finite fails here: a comparison with it would blame the wrong thing.
        """
        start = small(self.config, self.folder / "run-4x1", 4, 1)
        measured = measure(start, self.world, self.folder / "4x1")
        if self.config.checks.enabled:
            self.report = check_run(replace(start, checks=self.config.checks), self.world)
        if measured.wrong:
            raise RawloopError(NOT_FINITE + "; ".join(measured.wrong))
        loss = "evaluation is off" if measured.loss is None else f"eval_loss {measured.loss:.4f}"
        count, moving = len(measured.gradients), measured.moving
        moves = f"; training moves {len(moving)} buffers (first {moving[0]}): docs/checkpoints.md" if moving else ""
        return f"{count} trained weights have a gradient; {loss}{moves}"

    def labels(self) -> str:
        """The label census: see `rawloop.diagnose.census`."""
        return judged(self.need_report().labels())

    def first_loss(self) -> str:
        """Whether the first loss is plausible: see `rawloop.diagnose.verdict`."""
        return judged(self.need_report().first_loss())

    def causality(self) -> str:
        """Whether a prediction depends on its past and on nothing else: see `rawloop.diagnose.causality`."""
        report = self.need_report()
        if any("not finite" in verdict.why for verdict in report.verdicts):
            raise Skipped("not judged: the first loss is not finite")
        return judged(report.causality())

    def need_report(self) -> Report:
        """The findings of the checks before step 0."""
        if self.report is None:
            raise Skipped("checks.enabled is false")
        return self.report

    def equal_groupings(self) -> str:
        """Four micro-batches of one sample equal one of four; the evaluation takes batches of another size."""
        other = small(self.config, self.folder / "run-1x4", 1, 4)
        size = 1 if self.config.evaluation.batch_size > 1 else 3
        other = replace(other, evaluation=replace(other.evaluation, batch_size=size))
        measure(other, self.world, self.folder / "1x4")
        cause = "micro-batches are weighted by their targets, or the model mixes rows"
        return compare(self.folder / "4x1", self.folder / "1x4", cause)

    def equal_processes(self) -> str:
        """The same four samples, two on each of two ranks."""
        if self.world.device.type != "cpu" and torch.cuda.device_count() < 2:
            raise Skipped("one device here; run it where there are two, or with --device cpu")
        config = written(small(self.config, self.folder / "run-2", 2, 1), self.folder / "two.yaml")
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        finish([*launch, "-m", "rawloop", "doctor", "--config", str(config), "--part", str(self.folder / "2")])
        cause = "a rank sees other samples, or gradients are not averaged over ranks"
        return compare(self.folder / "4x1", self.folder / "2", cause)

    def killed_and_resumed(self) -> str:
        """Train in a process of its own; then again, killed after its first checkpoint, and resumed."""
        runs = [self.folder / name for name in ("straight", "killed")]
        straight, killed = (written(small(self.config, run, 1, 1), run.with_suffix(".yaml")) for run in runs)
        finish(["-m", "rawloop", "train", "--config", str(straight)])
        kill_after_first_checkpoint(killed, runs[1])
        finish(["-m", "rawloop", "train", "--config", str(killed), "--resume", "latest"])
        different = different_files(*(find_slots(run)[0] for run in runs))
        if different and self.world.device.type == "cpu":
            raise RawloopError(f"after {STEPS} steps these files differ: {', '.join(different)}")
        if different:
            return "it resumes; on this device kernels need not repeat bit for bit, so the weights were not compared"
        return f"after {STEPS} steps weights and optimizer are the same to the byte"


def outcome(name: str, check: Callable[[], str]) -> Finding:
    """Run a check; its error is its finding."""
    try:
        return Finding(name, "passed", check())
    except Skipped as error:
        return Finding(name, "skipped", str(error))
    except RawloopError as error:
        return Finding(name, "FAILED", str(error))


def judged(check: Check) -> str:
    """Return a check's summary with its warnings, or raise RawloopError if it stops a run."""
    if check.problems:
        raise RawloopError("; ".join(check.problems))
    return "; warning: ".join([check.summary, *check.warnings])


def different_files(first: Path, second: Path) -> list[str]:
    """The names of the safetensors files that differ between two slots."""
    own, other = ({str(p.relative_to(slot)): p for p in slot.rglob("*.safetensors")} for slot in (first, second))
    assert own, f"{first} holds no weights to compare"
    differ = [name for name in own.keys() & other.keys() if own[name].read_bytes() != other[name].read_bytes()]
    return sorted([*differ, *(own.keys() ^ other.keys())])


def written(config: RunConfig, file: Path) -> Path:
    """Write a config for a process of its own."""
    file.write_text(to_yaml(config), encoding="utf-8")
    return file


def finish(arguments: list[str]) -> None:
    """Run Python in a process of its own, or raise RawloopError if it fails or takes longer than `PATIENCE`."""
    command = [sys.executable, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)  # noqa: S603
    except subprocess.TimeoutExpired as error:
        raise RawloopError(f"`{' '.join(arguments)}` has not ended after {PATIENCE:.0f} seconds") from error
    if done.returncode:
        raise RawloopError(f"a process of its own ends with an error: {last_words(done.stderr)}")


def kill_after_first_checkpoint(config: Path, run_folder: Path) -> None:
    """Train in a process of its own and kill it once it has a checkpoint, or raise RawloopError if it ends before."""
    command = [sys.executable, "-m", "rawloop", "train", "--config", str(config)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:  # noqa: S603
        deadline = time.monotonic() + PATIENCE
        while not find_slots(run_folder) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
    if process.returncode != -signal.SIGKILL:
        raise RawloopError(f"the run that was to be killed ended by itself, with exit code {process.returncode}")


def last_words(text: str) -> str:
    """The line in which rawloop says why it failed, or else the last one."""
    lines = [line for line in text.splitlines() if line.strip()]
    return next((line for line in lines if line.startswith("rawloop ")), lines[-1] if lines else "no message")
