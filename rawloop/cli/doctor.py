"""`rawloop doctor`: does this config, on this machine, train what it says? Measured on the user's own model and data.

It trains a few steps in a temporary folder, so it costs what loading the model some times costs. Nothing of the user's
is written over.
"""

import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from os.path import expanduser
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rawloop.audio import import_torchaudio
from rawloop.build import build_run, check_run
from rawloop.checkpoint import find_slots
from rawloop.checkpoint.disk import readable
from rawloop.cli import COMMANDS
from rawloop.config import RunConfig, parse, to_yaml
from rawloop.diagnose import Report
from rawloop.dist import World, open_world
from rawloop.errors import RawloopError, UserError
from rawloop.loop import Run, accumulate, take_window

PART = "internal: measure gradients and the evaluation loss into this folder, as one of several processes"
CENSUS, LOSS, CAUSALITY = 0, 1, 2  # places of the checks in a report's events
STEPS, HALF = 4, 2  # steps of the run that is killed and resumed, and the step after which it is killed
FIRST_ROW = "data, model, first pass"
CHECKS = ("label census", "first loss", "causality probe")
NOT_FINITE = "not finite: "
NOT_JUDGED = "not judged: what the first pass gives is not finite"
PATIENCE = 600.0  # seconds for a process that the doctor starts
# Largest relative difference of gradients and evaluation losses between groupings of the same samples, by mode: some
# hundred units in the last place of what the mode computes in.
TOLERANCE = {"fp32": 1e-5, "bf16": 3e-2, "amp_fp16": 5e-3, "native_fp16": 5e-3}


class Finding(NamedTuple):
    """One row of the table."""

    check: str
    result: Literal["passed", "FAILED", "skipped"]
    found: str


def run(argv: list[str]) -> None:
    """Examine a config and print a table.

    Raises:
        RawloopError: something failed; the table says what.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    config, options = parse(argv, "rawloop doctor", {"part": PART}, COMMANDS["doctor"])
    with open_world(config.device, config.ddp.timeout) as world:
        if options["part"] is not None:
            measure(config, world, Path(options["part"]))
            return
        if world.size > 1:
            raise UserError("rawloop doctor starts its own processes: call it without torchrun")
        with tempfile.TemporaryDirectory(prefix="rawloop-doctor-") as folder:
            findings = list(examine(config, world, Path(folder)))
    failed = [finding.check for finding in findings if finding.result == "FAILED"]
    if failed:
        raise RawloopError(f"{len(failed)} of {len(findings)} checks failed: {', '.join(failed)}")


def examine(config: RunConfig, world: World, folder: Path) -> Iterator[Finding]:
    """Yield the findings one by one, printing each as it comes. What needs a check that failed is skipped."""
    reports: list[Report] = []
    checks: list[tuple[str, Callable[[], str]]] = [
        ("environment", lambda: environment(config, world)),
        (FIRST_ROW, lambda: one_by_one(config, world, folder, reports)),
        (CHECKS[0], lambda: labels(reports)),
        (CHECKS[1], lambda: first_loss(reports)),
        (CHECKS[2], lambda: causality(reports)),
        ("4 x 1 equals 1 x 4", lambda: equal_groupings(config, world, folder)),
        ("2 processes equal 1", lambda: equal_processes(config, world, folder)),
        ("killed and resumed, bit for bit", lambda: killed_and_resumed(config, world, folder)),
    ]
    waits = ""  # why what follows is not judged
    for name, check in checks:
        skipped = waits and not (waits == NOT_JUDGED and name in CHECKS)
        finding = Finding(name, "skipped", waits) if skipped else outcome(name, check)
        if finding.result == "FAILED" and name == FIRST_ROW:
            waits = NOT_JUDGED if finding.found.startswith(NOT_FINITE) else "mend what failed first"
        print(f"{finding.result:<8} {finding.check:<34} {finding.found}", flush=True)
        yield finding


class Skipped(RawloopError):
    """A check that this machine cannot do, or that cannot be judged."""


def outcome(name: str, check: Callable[[], str]) -> Finding:
    """Run a check; its error is its finding."""
    try:
        return Finding(name, "passed", check())
    except Skipped as error:
        return Finding(name, "skipped", str(error))
    except RawloopError as error:
        return Finding(name, "FAILED", str(error))


def environment(config: RunConfig, world: World) -> str:
    """Versions, device, bfloat16, torchaudio, and the room on the disk of the run folder."""
    import_torchaudio()
    names = ("torch", "transformers", "peft", "torchaudio")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    device = str(world.device)
    if world.device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        device = f"{torch.cuda.get_device_name(world.device)}, bfloat16 {'native' if native else 'not native'}"
    place = Path(expanduser(config.output))
    while not place.exists():
        place = place.parent
    free = readable(shutil.disk_usage(place).free)
    return f"Python {platform.python_version()}, {versions}; {device}; {free} free for {config.output}"


def small(config: RunConfig, output: Path, batch_size: int, accumulation: int) -> RunConfig:
    """The user's config with a small window, a few steps and nothing sent anywhere."""
    return replace(
        config,
        output=str(output),
        resume=None,
        adapter=replace(config.adapter, dropout=0.0),
        train=replace(config.train, batch_size=batch_size, accumulation=accumulation, max_steps=STEPS, log_every=1),
        checks=replace(config.checks, enabled=False),  # they have rows of their own
        evaluation=replace(config.evaluation, every=10**9, patience=0),
        checkpoint=replace(config.checkpoint, save_every=HALF, keep_last=0),
        records=replace(config.records, tensorboard=False, wandb=False, progress=False),
    )


def measure(config: RunConfig, world: World, folder: Path) -> "Measured":
    """Measure the first window and the evaluation loss, if there is one; other processes read it in `folder`."""
    built = build_run(config, world, lambda line: None)
    try:
        gradients, names = first_gradients(built)
        wrong = not_finite(built.meter.take(world), gradients, names)
        evaluation = built.evaluator.run() if built.evaluator else None
    finally:
        built.close()
    loss = evaluation.metrics["eval_loss"] if evaluation else None
    if evaluation and not evaluation.valid:
        wrong.append(f"eval_loss {loss}, in the batches of the samples {', '.join(evaluation.bad_ids)}")
    measured = Measured(gradients, loss, built.policy.name, wrong, list(built.buffers.places if built.buffers else ()))
    if world.is_main:
        folder.mkdir(exist_ok=True)
        save_file(gradients, folder / "gradients.safetensors")
        (folder / "loss.json").write_text(json.dumps({**measured._asdict(), "gradients": None}))
    return measured


class Measured(NamedTuple):
    """The first window's gradients, in float32 by name, the evaluation loss, the precision, and what is not finite.

    `moving` are the buffers that training moves, by name.
    """

    gradients: dict[str, Tensor]
    loss: float | None
    mode: str
    wrong: list[str]
    moving: Sequence[str] = ()


def first_gradients(built: Run) -> tuple[dict[str, Tensor], list[str]]:
    """Gradients of the first window over all ranks, without dropout, and the window's samples on this rank.

    A loss scale at which they overflow is lowered, as training does.
    """
    window, targets = take_window(built.windows.start(0), built)
    built.module.eval()
    scaler = built.policy.scaler
    while True:
        accumulate(built, window, targets)
        scale = scaler.scale if scaler else 1.0
        weights = built.policy.trained.weights.items()
        found = {name: (p.grad.float() / scale).cpu().contiguous() for name, p in weights if p.grad is not None}
        if scaler is None or scale <= scaler.config.floor or all(bool(g.isfinite().all()) for g in found.values()):
            return found, [name for batch in window for name in batch.ids]
        scaler.update(finite=False)
        built.policy.zero_grad(built.optimizer)


def not_finite(losses: dict[str, float], gradients: dict[str, Tensor], names: list[str]) -> list[str]:
    """What of the first window is not finite, in words."""
    wrong = [f"{name} {value}" for name, value in losses.items() if not math.isfinite(value) and name.count("/") == 1]
    bad = [name for name, gradient in gradients.items() if not bool(gradient.isfinite().all())]
    if bad:
        wrong.append(f"the gradients of {len(bad)} of {len(gradients)} trained weights (first {bad[0]})")
    return [f"{' and '.join(wrong)}, in the window of the samples {', '.join(names)}"] if wrong else []


def read_measure(folder: Path) -> Measured:
    """What `measure` wrote."""
    found = json.loads((folder / "loss.json").read_text())
    return Measured(**{**found, "gradients": load_file(folder / "gradients.safetensors")})


def one_by_one(config: RunConfig, world: World, folder: Path, reports: list[Report]) -> str:
    """Read, load, and run one window forward and backward; 4 x 1 is what the others are compared with.

    A loss or gradient that is not finite fails here: whatever is compared with it would be blamed for it. `reports`
    gets what the checks before step 0 found, if the config has them, for the rows that judge it.
    """
    start = small(config, folder / "run-4x1", 4, 1)
    gradients, loss, _, wrong, moving = measure(start, world, folder / "4x1")
    if config.checks.enabled:
        reports.append(check_run(replace(start, checks=config.checks), world))
    if wrong:
        raise RawloopError(NOT_FINITE + "; ".join(wrong))
    measured = "evaluation is off" if loss is None else f"eval_loss {loss:.4f}"
    moves = f"; training moves {len(moving)} buffers (first {moving[0]}): docs/checkpoints.md" if moving else ""
    return f"{len(gradients)} trained weights have a gradient; {measured}{moves}"


def labels(reports: list[Report]) -> str:
    """What of the data is learnt: see `rawloop.diagnose.census`."""
    report = the_report(reports)
    return judged(report, CENSUS, report.wrong_labels(), report.label_warnings())


def first_loss(reports: list[Report]) -> str:
    """Whether the first loss is what it can be: see `rawloop.diagnose.verdict`."""
    report = the_report(reports)
    return judged(report, LOSS, report.wrong_losses(), report.loss_warnings())


def causality(reports: list[Report]) -> str:
    """Whether predictions see their past and nothing else: see `rawloop.diagnose.causality`."""
    report = the_report(reports)
    if any("not finite" in verdict.why for verdict in report.verdicts):
        raise Skipped("not judged: the first loss is not finite")
    return judged(report, CAUSALITY, report.wrong_causality(), [])


def the_report(reports: list[Report]) -> Report:
    """What the checks before step 0 found."""
    if not reports:
        raise Skipped("checks.enabled is false")
    return reports[0]


def judged(report: Report, place: int, wrong: list[str], warnings: list[str]) -> str:
    """The sentence of one of the checks, with its warnings.

    Raises:
        RawloopError: it found something that stops a run.
    """
    if wrong:
        raise RawloopError("; ".join(wrong))
    return "; warning: ".join([report.events()[place][0], *warnings])


def equal_groupings(config: RunConfig, world: World, folder: Path) -> str:
    """The same four samples as four micro-batches; evaluated in batches of another size."""
    other = small(config, folder / "run-1x4", 1, 4)
    size = 1 if config.evaluation.batch_size > 1 else 3
    measure(replace(other, evaluation=replace(other.evaluation, batch_size=size)), world, folder / "1x4")
    return compare(
        folder / "4x1", folder / "1x4", "micro-batches are weighted by their targets, or the model mixes rows"
    )


def equal_processes(config: RunConfig, world: World, folder: Path) -> str:
    """The same four samples, two on each of two ranks."""
    if world.device.type != "cpu" and torch.cuda.device_count() < 2:
        raise Skipped("one device here; run it where there are two, or with --device cpu")
    other = small(config, folder / "run-2", 2, 1)
    arguments = ["doctor", "--config", str(written(other, folder / "two.yaml")), "--part", str(folder / "2")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    finish([*torchrun, "-m", "rawloop", *arguments])
    return compare(folder / "4x1", folder / "2", "a rank sees other samples, or gradients are not averaged over ranks")


def compare(first: Path, second: Path, cause: str) -> str:
    """Compare two measurements.

    Raises:
        RawloopError: they differ by more than rounding.
    """
    (one, loss, mode, *_), (other, other_loss, _, wrong, _) = read_measure(first), read_measure(second)
    if wrong:
        raise RawloopError(f"{NOT_FINITE}{'; '.join(wrong)}; as one batch of 4 on one process all is finite")
    if set(one) != set(other) or not one:
        raise RawloopError(f"gradients reach {len(one)} weights in one and {len(other)} in the other: {cause}")
    square = sum(float((one[name] - other[name]).double().square().sum()) for name in one)
    size = sum(float(one[name].double().square().sum()) for name in one)
    if not size:
        raise RawloopError("the gradient is zero in every trained weight: nothing is learnt, and nothing is compared")
    gaps = {"gradients": (square / size) ** 0.5}
    if loss is not None and other_loss is not None:
        gaps["eval_loss"] = abs(loss - other_loss) / max(abs(loss), 1e-12)
    found = " and ".join(f"{name} differ by {gap:.1e}" for name, gap in gaps.items())
    if not all(gap <= TOLERANCE[mode] for gap in gaps.values()):  # nan is on neither side
        raise RawloopError(f"{found}; rounding in {mode} explains {TOLERANCE[mode]:.0e}: {cause}")
    return found


def killed_and_resumed(config: RunConfig, world: World, folder: Path) -> str:
    """Train in a process of its own; then again, killed after its first checkpoint, and resumed."""
    straight, killed = (written(small(config, folder / name, 1, 1), folder / f"{name}.yaml") for name in ("a", "b"))
    train(straight)
    kill_after_first_checkpoint(killed, folder / "b")
    train(killed, "--resume", "latest")
    different = different_files(*(find_slots(folder / name)[0] for name in ("a", "b")))
    if different and world.device.type == "cpu":
        raise RawloopError(f"after {STEPS} steps these files differ: {', '.join(different)}")
    if different:
        return "it resumes; on this device kernels need not repeat bit for bit, so the weights were not compared"
    return f"after {STEPS} steps weights and optimizer are the same to the byte"


def different_files(first: Path, second: Path) -> list[str]:
    """The safetensors files of two slots that are not the same, by name."""
    own, other = ({str(p.relative_to(slot)): p for p in slot.rglob("*.safetensors")} for slot in (first, second))
    assert own, f"{first} holds no weights to compare"
    differ = [name for name in own.keys() & other.keys() if own[name].read_bytes() != other[name].read_bytes()]
    return sorted([*differ, *(own.keys() ^ other.keys())])


def written(config: RunConfig, file: Path) -> Path:
    """Write a config for a process of its own."""
    file.write_text(to_yaml(config), encoding="utf-8")
    return file


def train(config: Path, *more: str) -> None:
    """Train in a process of its own."""
    finish([sys.executable, "-m", "rawloop", "train", "--config", str(config), *more])


def finish(command: list[str]) -> None:
    """Run a command of our own to its end.

    Raises:
        RawloopError: it ended with an error, or not within `PATIENCE`.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)  # noqa: S603
    except subprocess.TimeoutExpired as error:
        raise RawloopError(f"`{' '.join(command[1:])}` has not ended after {PATIENCE:.0f} seconds") from error
    if done.returncode:
        raise RawloopError(f"a process of its own ends with an error: {last_words(done.stderr)}")


def kill_after_first_checkpoint(config: Path, run_folder: Path) -> None:
    """Start training and kill it as soon as a checkpoint stands in its folder.

    Raises:
        RawloopError: it ended before.
    """
    command = [sys.executable, "-m", "rawloop", "train", "--config", str(config)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:  # noqa: S603
        deadline = time.monotonic() + PATIENCE
        while not find_slots(run_folder) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
    if process.returncode != -signal.SIGKILL:
        raise RawloopError(f"the run that was to be killed ended by itself, with exit code {process.returncode}")


def last_words(text: str) -> str:
    """The line in which rawloop says what went wrong, or else the last one."""
    lines = [line for line in text.splitlines() if line.strip()]
    return next((line for line in lines if line.startswith("rawloop ")), lines[-1] if lines else "no message")
