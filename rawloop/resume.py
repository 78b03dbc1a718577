"""Resuming: choose the checkpoint that a run starts from, lock the run folder, and restore the run."""

import json
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
from rawloop.checkpoint.reader import Chosen, choose
from rawloop.checkpoint.run_folder import (
    Beginning,
    RunLock,
    check_nothing_has_begun,
    claim_run_folder,
    is_inside,
    lock_run_folder,
    mark_launch,
    remove_stop_file,
    where_to_begin,
)
from rawloop.checkpoint.slots import find_slots
from rawloop.checkpoint.writer import STATE
from rawloop.config import RunConfig, to_yaml
from rawloop.dist import World
from rawloop.errors import UserError
from rawloop.files import replace_file
from rawloop.loop import Run
from rawloop.weights import Source, find_source

Say = Callable[[str], None]


@dataclass
class Start:
    """The state that a run starts from, in a folder that is locked for it.

    `chosen` is the verified slot to resume from. If it is None, the run is new, with the weights of `source` if there
    is one. Rank 0 holds the `lock`.
    """

    beginning: Beginning
    chosen: Chosen | None
    source: Source | None
    lock: RunLock | None

    @property
    def slot(self) -> Path | None:
        """The slot to resume from."""
        return self.chosen.slot if self.chosen else None


def choose_start(folder: Path, config: RunConfig, world: World, say: Say) -> Start:
    """Lock the run folder and choose the state that the run starts from. Nothing is written before all checks pass.

    The lock comes first: until then another process may save, rotate, or begin a run there.
    """
    with ExitStack() as undo:
        lock = world.on_all_ranks(partial(lock_run_folder, folder), only_main=True)
        was_there = lock is not None
        if lock:
            undo.callback(lock.release, begun=False)
        beginning = where_to_begin(folder, config.resume, world)
        chosen = None
        if beginning.resume is not None:
            world.on_all_ranks(partial(check_resume, folder, beginning.resume), only_main=True)
            chosen = choose(folder, beginning.resume, world)
            world.on_all_ranks(partial(check_settings, chosen.slot, config, world.size), only_main=True)
        source = find_source(config.init_from, world) if config.init_from and chosen is None else None
        lock = claim_run_folder(folder, world, resume=beginning.own, lock=lock)
        if lock:
            undo.callback(lock.release, begun=False)
        world.on_all_ranks(lambda: None if was_there else check_nothing_has_begun(folder), only_main=True)
        removed = None if world.restarts else world.on_all_ranks(partial(remove_stop_file, folder), only_main=True)
        undo.pop_all()
    for notice in filter(None, (removed, lock.notice if lock else None)):
        say(notice)
    return Start(beginning, chosen, source, lock)


def check_resume(folder: Path, resume: str) -> None:
    """Refuse to resume from a checkpoint of another run than the one in the output folder."""
    there = resume != "latest" and Path(resume).expanduser().is_dir()  # `choose` refuses what is no folder
    if there and not is_inside(folder, resume) and find_slots(folder):
        raise UserError(
            f"resume is '{resume}', a checkpoint of another run than the one in output '{folder}', whose best and "
            "later checkpoints it would replace: pass another --output, or go on with that run by --resume latest"
        )


def goes_back(folder: Path, resume: str | None) -> bool:
    """Whether the user names a checkpoint of the run's own folder."""
    return resume is not None and resume not in ("latest", "auto") and is_inside(folder, resume)


def check_settings(slot: Path, config: RunConfig, world_size: int) -> None:
    """Compare the settings with the checkpoint's before anything is loaded or written; see `compare`."""
    stored = stored_settings(slot)
    if stored is not None:
        compare(stored, config, world_size)


def stored_precision(slot: Path | None) -> dict[str, Any] | None:
    """Read the precision state of a checkpoint: its mode must be known before weights are cast."""
    file = slot / STATE / "precision.json" if slot else None
    return json.loads(file.read_bytes()) if file and file.exists() else None


def restore(run: Run, config: RunConfig, start: Start, say: Say) -> None:
    """Restore the run if it is resumed, and make its folder ready. Random streams are restored last of all."""
    assert run.checkpoints is not None
    folder, step = run.checkpoints.folder, None
    if start.chosen is None and start.beginning.own:
        say(f"no checkpoint in {folder} yet: starting from the beginning")
        step = -1
    if start.chosen is not None:
        restored = run.checkpoints.restore(start.chosen)
        run.world.on_all_ranks(partial(_tell_changes, run, config, say), only_main=True)
        say(f"resumed from {restored.slot} at step {restored.step}")
        if run.best is not None:
            run.best.agree_with(run.checkpoints.best_record())
        if config.init_from:
            say(f"init_from {config.init_from} is done: the run goes on from its own checkpoint")
        step = restored.step
    run.checkpoints.start(run.state.step)
    if step is not None:  # after checkpoints that are given up are aside: the next resume mends a kill in between
        run.records.rewind(step, run.state.visited == step, [left["to"] for left in run.policy.chain.history])
    run.world.on_all_ranks(partial(mark_launch, folder, run.world), only_main=True)
    run.world.on_all_ranks(partial(_open_records, run, config, folder, start.source), only_main=True)


def _tell_changes(run: Run, config: RunConfig, say: Say) -> None:
    """Print and record the changed settings."""
    assert run.checkpoints is not None
    settings, base = run.checkpoints.parts.states[PART], run.checkpoints.parts.states["base"]
    assert isinstance(settings, SettingsState)
    assert isinstance(base, BaseFingerprint)
    lines = list(settings.taken)
    named = {line.partition(" ")[0] for line in lines}
    unchanged = any(line.startswith("data.eval ") and line.endswith(SAME) for line in lines)
    for key in ("model.stream_weights",) if unchanged else ("data.eval", "model.stream_weights"):
        if key in named and run.best and run.best.value is not None:
            lines.append(
                f"the best {run.best.metric} so far, {run.best.value:.6g}, was measured with the earlier {key}"
            )
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
        place = f"{origin.slot or origin.folder}{'' if origin.step is None else f' (step {origin.step})'}"
        run.records.event(
            "restore", step=step, reason=f"started from the weights of {place}", init_from=origin.state_dict()
        )
    run.records.event("precision", step=step, reason=run.policy.reason, mode=run.policy.name)
    reason = f"training to step {run.total_steps}"
    if step >= run.total_steps:
        reason = f"nothing is left to train: {run.total_steps} steps are asked for, {step} are done"
    if run.world.restarts:
        reason += f"; torchrun has started the processes again ({run.world.restarts})"
    run.records.event("start", step=step, reason=reason, restarts=run.world.restarts, **_environment(run))


def _environment(run: Run) -> dict[str, Any]:
    device = run.world.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    return {"world_size": run.world.size, "device": name, **versions}
