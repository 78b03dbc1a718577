"""Chooses the checkpoint that a run starts from, locks the run folder, and restores the run."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from rawloop.adapters.fingerprint import BaseFingerprint
from rawloop.changes import PART, SAME, SettingsState, compare, stored_settings
from rawloop.checkpoint.reader import choose
from rawloop.checkpoint.run_folder import (
    RunLock,
    check_no_run,
    choose_resume,
    claim_run_folder,
    is_inside,
    mark_launch,
    remove_stop_file,
)
from rawloop.checkpoint.slots import find_slots
from rawloop.config import RunConfig, to_yaml
from rawloop.dist import World
from rawloop.errors import UserError
from rawloop.files import replace_file
from rawloop.loop import Run
from rawloop.weights import Source, find_source

Say = Callable[[str], None]


@dataclass
class Start:
    """The state that a run starts from.

    Attributes:
        slot: the verified slot to resume from; None in a new run.
        damaged: the damaged newer slots, each with the reason.
        is_continued: whether the files in the run folder belong to this run, even if it has no checkpoint yet.
        source: the weights of a new run with `init_from`.
        lock: of the run folder, on rank 0.
    """

    slot: Path | None
    damaged: dict[Path, str]
    is_continued: bool
    source: Source | None
    lock: RunLock | None


def choose_start(folder: Path, config: RunConfig, world: World, say: Say) -> Start:
    """Lock the run folder and choose the state that the run starts from. Nothing is written before all checks pass.

    The lock is first: until then another process may save, delete slots, or start a run there.
    """
    with ExitStack() as undo:
        lock = world.on_all_ranks(lambda: RunLock(folder) if folder.is_dir() else None, only_main=True)
        existed = lock is not None
        if lock:
            undo.callback(lock.release, started=False)
        resume, is_continued = choose_resume(folder, config.resume, world)
        slot: Path | None = None
        damaged: dict[Path, str] = {}
        if resume is not None:
            world.on_all_ranks(partial(check_resume, folder, resume), only_main=True)
            slot, damaged = choose(folder, resume, world)
            world.on_all_ranks(partial(check_settings, slot, config, world.size), only_main=True)
        source = find_source(config.init_from, world) if config.init_from and slot is None else None
        lock = claim_run_folder(folder, world, resume=is_continued, lock=lock)
        if lock:
            undo.callback(lock.release, started=False)
        world.on_all_ranks(lambda: None if existed else check_no_run(folder), only_main=True)
        removed = None if world.restarts else world.on_all_ranks(partial(remove_stop_file, folder), only_main=True)
        undo.pop_all()
    if removed:
        say(removed)
    return Start(slot, damaged, is_continued, source, lock)


def check_resume(folder: Path, resume: str) -> None:
    """Refuse a checkpoint of another run if the output folder holds a run with checkpoints."""
    there = resume != "latest" and Path(resume).expanduser().is_dir()  # `choose` refuses what is no folder
    if there and not is_inside(folder, resume) and find_slots(folder):
        raise UserError(
            f"resume is '{resume}', a checkpoint of another run, and output '{folder}' already has checkpoints, which "
            "would be replaced: pass another --output, or continue the run in there with --resume latest"
        )


def goes_back(folder: Path, resume: str | None) -> bool:
    """Whether the user names a checkpoint in the run's folder."""
    return resume is not None and resume not in ("latest", "auto") and is_inside(folder, resume)


def check_settings(slot: Path, config: RunConfig, world_size: int) -> None:
    """Compare the settings with those of a checkpoint, before anything is loaded or written; see `compare`."""
    stored = stored_settings(slot)
    if stored is not None:
        compare(stored, config, world_size)


def restore(run: Run, config: RunConfig, start: Start, say: Say) -> None:
    """Restore the run if it is resumed, and prepare its folder. Random streams are restored last."""
    assert run.checkpoints is not None
    folder, step = run.checkpoints.folder, None
    if start.slot is None and start.is_continued:
        say(f"no checkpoint in {folder} yet: starting from the beginning")
        step = -1
    if start.slot is not None:
        restored = run.checkpoints.restore(start.slot, start.damaged)
        run.world.on_all_ranks(partial(_report_changes, run, say), only_main=True)
        say(f"resumed from {restored.slot} at step {restored.step}")
        if run.best is not None:
            run.best.agree_with(run.checkpoints.best_record())
        if config.init_from:
            say(f"init_from {config.init_from} is done: the run resumes from its own checkpoint")
        step = restored.step
    run.checkpoints.start(run.state.step)
    if step is not None:  # after later checkpoints are moved aside, so that a resume after a kill here rewinds again
        run.records.rewind(step, run.state.visited == step, [left["to"] for left in run.policy.chain.history])
    run.world.on_all_ranks(partial(mark_launch, folder, run.world), only_main=True)
    run.world.on_all_ranks(partial(_open_records, run, config, folder, start.source), only_main=True)


def _report_changes(run: Run, say: Say) -> None:
    """Print and record the changed settings."""
    assert run.checkpoints is not None
    settings, base = run.checkpoints.parts.states[PART], run.checkpoints.parts.states["base"]
    assert isinstance(settings, SettingsState)
    assert isinstance(base, BaseFingerprint)
    lines = list(settings.taken)
    changed = {line.partition(" ")[0] for line in lines if not (line.startswith("data.eval ") and line.endswith(SAME))}
    if run.best and run.best.value is not None:
        best = f"the best {run.best.metric} so far, {run.best.value:.6g}, was measured with the earlier"
        lines += [f"{best} {key}" for key in ("data.eval", "model.stream_weights") if key in changed]
    lines += [base.notice] if base.notice else []
    for line in lines:
        say(line)
    if lines:
        reason = f"settings have changed: {'; '.join(lines)}"
        run.records.event("restore", step=run.state.step, reason=reason, changes=lines)


def _open_records(run: Run, config: RunConfig, folder: Path, origin: Source | None) -> None:
    replace_file(folder / "config.yaml", to_yaml(config))
    step = run.state.step
    if origin is not None:
        at_step = "" if origin.step is None else f" (step {origin.step})"
        reason = f"started from the weights of {origin.slot or origin.folder}{at_step}"
        run.records.event("restore", step=step, reason=reason, init_from=origin.state_dict())
    policy = run.policy
    fields: dict[str, Any] = {"mode": policy.name, "remedies": policy.remedies}
    run.records.event("precision", step=step, reason=policy.reason, show=False, **fields)  # shown before the checks
    reason = f"training to step {run.total_steps}"
    if step >= run.total_steps:
        reason = f"nothing is left to train: {run.total_steps} steps are asked for, {step} are done"
    if run.world.restarts:
        reason += f"; torchrun has started the processes again ({run.world.restarts})"
    device = run.world.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = {package: version(package) for package in ("torch", "transformers", "peft")}
    facts: dict[str, Any] = {
        "total_steps": run.total_steps,
        "restarts": run.world.restarts,
        "world_size": run.world.size,
        "device": name,
        **versions,
    }
    run.records.event("start", step=step, reason=reason, **facts)
