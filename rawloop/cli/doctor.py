"""`rawloop doctor` measures, on the user's model and data, whether a config trains correctly on this machine.

It trains a few steps in a temporary folder and writes nothing else. It costs the loading of the model a few times.
"""

import math
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from os.path import expanduser
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rawloop.audio import import_torchaudio
from rawloop.build import build_run, check_run
from rawloop.checkpoint.slots import find_slots
from rawloop.cli import read_config
from rawloop.config import RunConfig, to_yaml
from rawloop.diagnose.checks import Report
from rawloop.dist import World, open_world
from rawloop.errors import RawloopError, UserError
from rawloop.files import existing, readable
from rawloop.loop import Run, TrainConfig, accumulate, agree_on_window, fetch
from rawloop.sharding import whole

FIRST_ROW = "data, model, first pass"
CHECKS = ("label census", "first loss", "causality probe")  # in the order of `Report.checks`
NOT_FINITE = "not finite: "
NOT_JUDGED = "not judged: what the first pass gives is not finite"
STEPS = 4  # of a small run
PATIENCE = 600.0  # seconds for a process that the doctor starts
# Largest relative difference of gradients and evaluation losses between groupings of the same samples, by mode: some
# hundred units in the last place of the dtype in which the mode computes.
TOLERANCE = {"fp32": 1e-5, "bf16": 3e-2, "amp_fp16": 5e-3, "native_fp16": 5e-3}


def run(argv: list[str]) -> None:
    """Examine a config and print a table. A failed check is an error."""
    config, options, _ = read_config("doctor", argv)
    with open_world(config.device, config.ddp.timeout) as world:
        if options.part is not None:
            measured = measure(config, world)
            if world.is_main:
                torch.save(tuple(measured), options.part)
            return
        if world.size > 1:
            raise UserError("rawloop doctor starts its own processes: call it without torchrun")
        with tempfile.TemporaryDirectory(prefix="rawloop-doctor-") as folder:
            Doctor(config, world, Path(folder)).examine()


class Skipped(RawloopError):
    """A check that this machine cannot do, or whose result cannot be judged."""


class Measured(NamedTuple):
    """The gradients of the first window, and what else is compared or shown."""

    gradients: dict[str, Tensor]  # float32, by name
    loss: float | None  # of the evaluation
    mode: str
    wrong: Sequence[str] = ()  # all that is not finite
    moving: Sequence[str] = ()  # names of the buffers that training moves


class Doctor:
    """The checks of a config. Each is a method that returns its finding, or raises a RawloopError with it."""

    def __init__(self, config: RunConfig, world: World, folder: Path) -> None:
        self.config, self.world, self.folder = config, world, folder
        self.report: Report | None = None  # of the checks before step 0
        self.first = Measured({}, None, "")  # of four micro-batches of one sample

    def examine(self) -> None:
        """Run the checks and print a row for each. Raise RawloopError if one failed; skip those that need it."""
        checks: dict[str, Callable[[], str]] = {
            "environment": self.environment,
            FIRST_ROW: self.first_pass,
            **{name: partial(self.before_step_0, place) for place, name in enumerate(CHECKS)},
            "4 x 1 equals 1 x 4": self.equal_groupings,
            "2 processes equal 1": self.equal_processes,
            "killed and resumed, bit for bit": self.killed_and_resumed,
        }
        failed = []
        blocked = ""  # why the later checks are not judged
        for name, check in checks.items():
            skipped = blocked and not (blocked == NOT_JUDGED and name in CHECKS)
            result, found = ("skipped", blocked) if skipped else outcome(check)
            failed += [name] if result == "FAILED" else []
            if result == "FAILED" and name == FIRST_ROW:
                blocked = NOT_JUDGED if found.startswith(NOT_FINITE) else "mend what failed first"
            print(f"{result:<8} {name:<34} {found}", flush=True)
        if failed:
            raise RawloopError(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")

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
        free = readable(shutil.disk_usage(existing(Path(expanduser(self.config.output)))).free)
        return f"Python {platform.python_version()}, {versions}; {device}; {free} free for {self.config.output}"

    def first_pass(self) -> str:
        """Read, load, and run one window forward and backward as 4 x 1. The other groupings are compared with it."""
        start = small(self.config, self.folder / "run-4x1", 4, 1)
        self.first = measure(start, self.world)
        if self.config.checks.enabled:
            self.report = check_run(replace(start, checks=self.config.checks), self.world)
        if self.first.wrong:  # a comparison with it would blame the wrong thing
            raise RawloopError(NOT_FINITE + "; ".join(self.first.wrong))
        loss = "evaluation is off" if self.first.loss is None else f"eval_loss {self.first.loss:.4f}"
        count, moving = len(self.first.gradients), self.first.moving
        moves = f"; training moves {len(moving)} buffers (first {moving[0]}): docs/checkpoints.md" if moving else ""
        return f"{count} trained weights have a gradient; {loss}{moves}"

    def before_step_0(self, place: int) -> str:
        """Return the summary and the warnings of one of `CHECKS`: see `rawloop.diagnose`."""
        if self.report is None:
            raise Skipped("checks.enabled is false")
        if place == 2 and any("not finite" in verdict.why for verdict in self.report.verdicts):
            raise Skipped("not judged: the first loss is not finite")
        check = self.report.checks()[place]
        if check.problems:
            raise RawloopError("; ".join(check.problems))
        return "; warning: ".join([check.summary, *check.warnings])

    def equal_groupings(self) -> str:
        """Four micro-batches of one sample equal one of four. The evaluation takes batches of another size."""
        other = small(self.config, self.folder / "run-1x4", 1, 4)
        other.evaluation = replace(other.evaluation, batch_size=1 if other.evaluation.batch_size > 1 else 3)
        cause = "micro-batches are weighted by their targets, or the model mixes rows"
        return compare(self.first, measure(other, self.world), cause)

    def equal_processes(self) -> str:
        """The same four samples, two on each of two ranks."""
        if self.world.device.type != "cpu" and torch.cuda.device_count() < 2:
            raise Skipped("one device here; run it where there are two, or with --device cpu")
        config, part = write_config(small(self.config, self.folder / "run-2", 2, 1)), self.folder / "part"
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        run_python([*launch, "-m", "rawloop", "doctor", "--config", str(config), "--part", str(part)])
        cause = "a rank sees other samples, or gradients are not averaged over ranks"
        return compare(self.first, Measured(*torch.load(part)), cause)

    def killed_and_resumed(self) -> str:
        """Train in another process; then again, killed after its first checkpoint, and resumed."""
        runs = [self.folder / name for name in ("straight", "killed")]
        straight, killed = (write_config(small(self.config, run, 1, 1)) for run in runs)
        run_python(["-m", "rawloop", "train", "--config", str(straight)])
        kill_after_first_checkpoint(killed, runs[1])
        run_python(["-m", "rawloop", "train", "--config", str(killed), "--resume", "latest"])
        different = different_files(*(find_slots(run)[0] for run in runs))
        if different and self.world.device.type == "cpu":
            raise RawloopError(f"after {STEPS} steps these files differ: {', '.join(different)}")
        if different:
            return "it resumes; on this device kernels need not repeat bit for bit, so the weights were not compared"
        return f"after {STEPS} steps weights and optimizer are the same to the byte"


def outcome(check: Callable[[], str]) -> tuple[str, str]:
    """Run a check, and return its result and what it found."""
    try:
        return "passed", check()
    except RawloopError as error:
        return "skipped" if isinstance(error, Skipped) else "FAILED", str(error)


def small(config: RunConfig, output: Path, batch_size: int, accumulation: int) -> RunConfig:
    """Return the user's config with a small window and a few steps, and with no metrics sent anywhere."""
    return replace(
        config,
        output=str(output),
        resume=None,
        adapter=replace(config.adapter, dropout=0.0),
        train=TrainConfig(batch_size, accumulation, max_steps=STEPS, log_every=1, rehearse=False),
        checks=replace(config.checks, enabled=False),  # they have their own rows
        evaluation=replace(config.evaluation, every=10**9, patience=0),
        checkpoint=replace(config.checkpoint, save_every=STEPS // 2, keep_last=0),
        records=replace(config.records, report_to=[], progress=False),
    )


def measure(config: RunConfig, world: World) -> Measured:
    """Measure the gradients of the first window, and the evaluation loss if there is one."""
    built = build_run(config, world, lambda line: None)
    try:
        gradients, ids = first_gradients(built)
        losses = built.meter.take(world)
        evaluation = built.evaluator.run() if built.evaluator else None
    finally:
        built.close()
    wrong = [f"{name} {value}" for name, value in losses.items() if not math.isfinite(value) and name.count("/") == 1]
    if bad := [name for name, gradient in gradients.items() if not gradient.isfinite().all()]:
        wrong.append(f"the gradients of {len(bad)} of {len(gradients)} trained weights (first {bad[0]})")
    wrong = [f"{' and '.join(wrong)}, in the window of the samples {', '.join(ids)}"] if wrong else []
    loss = evaluation.metrics["eval_loss"] if evaluation else None
    if evaluation and not evaluation.valid:
        wrong.append(f"eval_loss {loss}, in the batches of the samples {', '.join(evaluation.bad_ids)}")
    return Measured(gradients, loss, built.policy.name, wrong, list(built.buffers.places if built.buffers else ()))


def first_gradients(built: Run) -> tuple[dict[str, Tensor], list[str]]:
    """Return the gradients of the first window over all ranks, without dropout, and this rank's samples.

    Sharded gradients are gathered on rank 0.
    """
    window, targets, _ = agree_on_window(built, fetch(iter(built.windows(0)), built.throughput))
    built.module.eval()
    scaler = built.policy.scaler
    while True:
        accumulate(built, window, targets)
        scale = scaler.scale if scaler else 1.0
        weights = built.policy.trained.weights.items()
        given = {name: whole(p.grad) for name, p in weights if p.grad is not None}
        found = {name: (gradient.float() / scale).cpu().contiguous() for name, gradient in given.items()}
        is_finite = all(bool(gradient.isfinite().all()) for gradient in found.values())
        if scaler is None or scale <= scaler.config.floor or not any(built.world.any([not is_finite])):
            return found, [name for batch in window for name in batch.ids]
        scaler.update(finite=False)  # lower the loss scale until they do not overflow, as in training
        built.policy.zero_grad(built.optimizer)


def compare(first: Measured, second: Measured, cause: str) -> str:
    """Compare two measurements, or raise RawloopError if they differ by more than rounding."""
    one, other, mode = first.gradients, second.gradients, first.mode
    if second.wrong:
        raise RawloopError(f"{NOT_FINITE}{'; '.join(second.wrong)}; as one batch of 4 on one process all is finite")
    if set(one) != set(other) or not one:
        raise RawloopError(f"gradients reach {len(one)} weights in one and {len(other)} in the other: {cause}")
    square = sum(float((one[name] - other[name]).double().square().sum()) for name in one)
    size = sum(float(one[name].double().square().sum()) for name in one)
    if not size:
        raise RawloopError("the gradient is zero in every trained weight: nothing is learnt, and nothing is compared")
    gaps = {"gradients": (square / size) ** 0.5}
    if first.loss is not None and second.loss is not None:
        gaps["eval_loss"] = abs(first.loss - second.loss) / max(abs(first.loss), 1e-12)
    found = " and ".join(f"{name} differ by {gap:.1e}" for name, gap in gaps.items())
    if not all(gap <= TOLERANCE[mode] for gap in gaps.values()):  # written so that nan fails too
        raise RawloopError(f"{found}; rounding in {mode} explains {TOLERANCE[mode]:.0e}: {cause}")
    return found


def different_files(first: Path, second: Path) -> list[str]:
    """Return the names of the safetensors files that differ between two slots."""
    one, other = ({str(p.relative_to(slot)): p for p in slot.rglob("*.safetensors")} for slot in (first, second))
    assert one, f"{first} holds no weights to compare"
    differ = [name for name in one.keys() & other.keys() if one[name].read_bytes() != other[name].read_bytes()]
    return sorted([*differ, *(one.keys() ^ other.keys())])


def write_config(config: RunConfig) -> Path:
    """Write a config for another process, beside its output folder."""
    file = Path(config.output).with_suffix(".yaml")
    file.write_text(to_yaml(config), encoding="utf-8")
    return file


def run_python(arguments: list[str]) -> None:
    """Run Python in another process, or raise RawloopError if it fails or takes longer than `PATIENCE`."""
    command = [sys.executable, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)  # noqa: S603
    except subprocess.TimeoutExpired as error:
        raise RawloopError(f"`{' '.join(arguments)}` has not ended after {PATIENCE:.0f} seconds") from error
    if done.returncode:
        raise RawloopError(f"a process that the doctor started has failed: {last_words(done.stderr)}")


def kill_after_first_checkpoint(config: Path, run_folder: Path) -> None:
    """Train in another process and kill it once it has a checkpoint, or raise RawloopError if it ends before."""
    command = [sys.executable, "-m", "rawloop", "train", "--config", str(config)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:  # noqa: S603
        deadline = time.monotonic() + PATIENCE
        while not find_slots(run_folder) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
    if process.returncode != -signal.SIGKILL:
        raise RawloopError(f"the run that was to be killed ended by itself, with exit code {process.returncode}")


def last_words(text: str) -> str:
    """Return the line in which rawloop says why it failed, or else the last line."""
    lines = [line for line in text.splitlines() if line.strip()]
    return next((line for line in lines if line.startswith("rawloop ")), lines[-1] if lines else "no message")
