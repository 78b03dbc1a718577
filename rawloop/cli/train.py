"""`rawloop train`: fine-tune a model. `torchrun --nproc_per_node=N -m rawloop train --config FILE` for N processes."""

import math
import os
import sys
from contextlib import ExitStack
from functools import partial
from os.path import expanduser
from pathlib import Path

from rawloop.build import build_run
from rawloop.checkpoint.run_folder import mark_launch
from rawloop.checkpoint.slots import best_record, find_best, find_latest
from rawloop.cli import CONTINUE, EXIT_CODE_FILE, read_config
from rawloop.config import moved_run
from rawloop.dist import open_world
from rawloop.errors import Preempted
from rawloop.loop import Run, train
from rawloop.output import rank_log
from rawloop.preempt import INTERRUPTED, STOP_FILE, watch_ctrl_c, watch_signals
from rawloop.records import read_metrics

SIGNAL_FILE = "RAWLOOP_SIGNAL_FILE"  # launch/torchrun.py names a file here, and makes it when it receives SIGUSR1


def run(argv: list[str]) -> None:
    """Read the config, build the run, train, and print a summary."""
    parsed = read_config("train", argv)
    config = parsed.config
    folder = Path(expanduser(config.output))
    signal_file = os.environ.get(SIGNAL_FILE)
    with ExitStack() as outside, open_world(config.device, config.ddp.timeout) as world, rank_log(world) as log:
        # Entered only now: before that a signal ends a process that waits for the others to come.
        watch = watch_signals(folder / STOP_FILE, Path(signal_file) if signal_file else None)
        preemption = outside.enter_context(watch)
        notice = moved_run(parsed)
        if notice and world.is_main:
            complain(notice)
        say = partial(print, flush=True) if world.is_main else lambda line: None
        built = build_run(config, world, say, partial(log.open, folder))
        built.preemption = preemption
        try:
            with watch_ctrl_c(preemption, complain if world.is_main else lambda line: None, end_at_once):
                train(built)
            if world.is_main:
                print(summary(built, folder), flush=True)
        except Preempted:
            try:
                mark_launch(folder, world, stopped=True)
            except OSError as error:  # the run has stopped and is saved all the same
                complain(f"the stop could not be marked ({error}): torchrun --max-restarts will start it again")
            raise
        finally:
            built.close()


def complain(line: str) -> None:
    """Print a line to standard error."""
    after_bar = "\n" if sys.stderr.isatty() else ""
    print(f"{after_bar}rawloop train: {line}", file=sys.stderr, flush=True)


def end_at_once() -> None:
    """End this process now, after a second Ctrl-C."""
    complain(f"interrupted; what was saved is whole{CONTINUE['train']}")
    if file := os.environ.get(EXIT_CODE_FILE):
        Path(file).write_text(str(INTERRUPTED))
    os._exit(INTERRUPTED)


def summary(run: Run, folder: Path) -> str:
    """Return how the evaluation loss changed, and the paths of the results."""
    assert run.checkpoints is not None
    lines = [f"trained {run.state.step} steps, {run.state.samples:,} samples, {run.state.skipped} updates skipped"]
    name = run.best.metric if run.best else ""
    lines_of = ((line["step"], line.get(name)) for line in read_metrics(folder))
    measured = [(step, value) for step, value in lines_of if isinstance(value, (int, float))]
    if measured and run.best and run.best.value is not None:
        (step, first), value = measured[0], run.best.value
        moved = f", {100 * (value - first) / first:+.1f}%" if first and math.isfinite(first) else ""
        lines.append(f"{name} {first:.4f} at step {step} -> {value:.4f} at step {run.best.step} (best{moved})")
        slot, written = find_best(folder), best_record(folder)
        given_up = written is not None and written.step != run.best.step
        lines.append(f"best:        {folder / 'best'}{' (of a continuation that was given up)' if given_up else ''}")
        if (folder / "best").is_dir():
            slot = folder / "best"
    else:
        slot = find_latest(folder).slot
    lines += [f"adapter:     {path}" for path in (slot or folder).glob("adapter")]
    lines += [f"checkpoints: {folder / 'checkpoints'}", f"metrics:     {folder / 'metrics.jsonl'}"]
    return "\n".join(lines)
