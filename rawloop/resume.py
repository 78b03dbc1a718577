"""Where a run begins, and putting it back there: whose the folder is, which checkpoint is gone on from, with what."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from rawloop.adapters import BaseFingerprint
from rawloop.changes import PART, SettingsState, compare, stored_settings
from rawloop.checkpoint import (
    claim_run_folder,
    find_best,
    find_slots,
    mark_launch,
    remove_stop_file,
    where_to_begin,
)
from rawloop.checkpoint.disk import replace_text
from rawloop.checkpoint.manifest import NAME as MANIFEST
from rawloop.checkpoint.reader import check_slot
from rawloop.checkpoint.run_folder import Beginning
from rawloop.checkpoint.writer import STATE
from rawloop.config import RunConfig, to_yaml
from rawloop.dist import World
from rawloop.errors import UserError
from rawloop.loop import Run, TrainState

Say = Callable[[str], None]


def claim(folder: Path, config: RunConfig, world: World, say: Say) -> Beginning:
    """Decide what the run begins from, and make the folder its own."""
    beginning = where_to_begin(folder, config.resume, world)
    if beginning.resume is not None:
        world.together(partial(check_resume, folder, beginning.resume), only_main=True)
        world.together(partial(check_settings, folder, beginning.resume, config, world.size), only_main=True)
    claim_run_folder(folder, world, resume=beginning.own)
    removed = remove_stop_file(folder, world) if not world.restarts else None
    if removed:
        say(removed)
    return beginning


def check_resume(folder: Path, resume: str) -> None:
    """Refuse to resume from nothing, or over another run, before anything is written.

    Raises:
        UserError: there is no such checkpoint, or it is of another run than the one in the output folder.
        CheckpointError: it is damaged.
    """
    if resume == "latest":
        if not find_slots(folder):
            raise UserError(f"resume is 'latest', but '{folder}' has no checkpoint: start without --resume")
        return
    slot = Path(resume).expanduser()
    if not (slot / MANIFEST).is_file():
        check_slot(slot)
    if find_slots(folder) and not slot.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"resume is '{resume}', a checkpoint of another run than the one in output '{folder}', whose best and "
            "later checkpoints it would replace: pass another --output"
        )


def check_settings(folder: Path, resume: str, config: RunConfig, world_size: int) -> None:
    """Refuse changed settings that would make another run of it, before anything is loaded or written.

    Restoring compares once more: it may pass over this checkpoint for an older one.

    Raises:
        UserError: see `compare`.
    """
    slot = slot_to_resume(folder, resume)
    stored = stored_settings(slot) if slot is not None else None
    if stored is not None:
        compare(stored, config, world_size)


def slot_to_resume(folder: Path, resume: str) -> Path | None:
    """The checkpoint that `resume` means, not verified yet; None if `latest` finds none."""
    return next(iter(find_slots(folder)), None) if resume == "latest" else Path(resume).expanduser()


def stored_precision(slot: Path | None) -> dict[str, Any] | None:
    """What a checkpoint says of its precision mode: a run that fell back goes on in the mode that it fell back to.

    It must be known before weights are cast, which is before a checkpoint is verified; None if it cannot be read, which
    restoring will find and name.
    """
    try:
        state = json.loads((slot / STATE / "precision.json").read_bytes()) if slot else None
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) and {"mode", "reason", "history"} <= set(state) else None


def restore(run: Run, config: RunConfig, beginning: Beginning, say: Say) -> None:
    """Restore the run if it is resumed, and make its folder ready. Random streams are restored last of all."""
    assert run.checkpoints is not None
    folder = run.checkpoints.folder
    resume = beginning.resume
    if resume is None and beginning.own:
        say(f"no checkpoint in {folder} yet: starting from the beginning")
        run.records.rewind(-1)
    if resume is not None:
        restored = run.checkpoints.load(resume if resume == "latest" else Path(resume).expanduser())
        run.world.together(partial(_tell_changes, run, config, say), only_main=True)
        run.records.rewind(restored.step, evaluated=run.state.visited == restored.step)
        say(f"resumed from {restored.slot} at step {restored.step}")
        if run.best and run.world.from_main(find_best(folder) is None):
            run.best.forget()  # the best slot stayed with the run that this one continues
    run.checkpoints.start(run.state.step)
    run.world.together(partial(mark_launch, folder, run.world, "begun"), only_main=True)
    run.world.together(partial(_open_records, run, config, folder), only_main=True)


def _tell_changes(run: Run, config: RunConfig, say: Say) -> None:
    """Say what is taken of changed settings, and what follows from it."""
    assert run.checkpoints is not None
    settings, base = run.checkpoints.parts.states[PART], run.checkpoints.parts.states["base"]
    assert isinstance(settings, SettingsState)
    assert isinstance(base, BaseFingerprint)
    lines = list(settings.taken)
    named = {line.partition(" ")[0] for line in lines}
    lines += [f"{key} {then} -> {now}" for key, (then, now) in run.state.differed.items() if key not in named]
    if run.state.differed:
        lines.append(_position(run.state))
    if "data.eval" in named and run.best and run.best.value is not None:
        lines.append(f"the best {run.best.metric} so far, {run.best.value:.6g}, was measured on the data.eval of then")
    lines += [base.notice] if base.notice else []
    for line in lines:
        say(line)
    if lines:
        reason = f"settings have changed: {'; '.join(lines)}"
        run.records.event("restore", step=run.state.step, reason=reason, changes=lines)


def _position(state: TrainState) -> str:
    """What the number of the window, which is kept, means in another data order."""
    before = {**state.data, **{key: then for key, (then, _) in state.differed.items()}}
    then, now = (state.window * int(d["window_size"]) / int(d["num_samples"]) for d in (before, state.data))
    return f"the data order is another one, its window {state.window} is next: epoch {then:.2f} then, {now:.2f} now"


def _open_records(run: Run, config: RunConfig, folder: Path) -> None:
    replace_text(folder / "config.yaml", to_yaml(replace(config, resume_force=[])))  # that is done
    step = run.state.step
    run.records.event("precision", step=step, reason=run.policy.reason, mode=run.policy.name)
    run.records.event("start", step=step, reason=f"training to step {run.total_steps}", **_environment(run))


def _environment(run: Run) -> dict[str, Any]:
    device = run.world.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    return {"world_size": run.world.size, "device": name, **versions}
