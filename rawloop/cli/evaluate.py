"""`rawloop evaluate`: the true eval_loss of the base model or of a checkpoint, on any number of processes."""

import json
import sys
from functools import partial
from os.path import expanduser
from pathlib import Path
from typing import NamedTuple

from rawloop.adapters.files import ModelFiles
from rawloop.adapters.fingerprint import BaseFingerprint
from rawloop.changes import Contents, check_reading, check_settings_of_ranks, stored_settings
from rawloop.checkpoint.reader import check_same, stored_part
from rawloop.checkpoint.slots import MANIFEST, is_slot_name, read_manifest, verify
from rawloop.cli import read_config
from rawloop.components import build_evaluator, build_family, build_loader, build_model, read_data
from rawloop.config import RunConfig, moved_run
from rawloop.data.limits import Limits
from rawloop.dist import World, open_world
from rawloop.errors import CheckpointError, RawloopError, UserError
from rawloop.evaluate import Evaluator
from rawloop.families.chat_template import clock_notice
from rawloop.losses import LossModule
from rawloop.precision.modes import OtherMode
from rawloop.records import json_value
from rawloop.weights import resolve


def run(argv: list[str]) -> None:
    """Evaluate, and print one JSON object: what was evaluated, and its metrics. Fails if a loss is not finite."""
    config, options = read_config("evaluate", argv)
    with open_world(config.device, config.ddp.timeout) as world:
        notice = moved_run(argv, config)
        if notice:
            _tell(notice, world)
        check_settings_of_ranks(config, world)
        built = world.on_all_ranks(partial(_build, config, options["checkpoint"], world))
        assert built is not None
        check_same(built.slot, world)
        built.contents.check_ranks(built.base, world)
        what = f"{built.slot} (step {built.step})" if built.slot else "the base model: no --checkpoint is given"
        for line in (*filter(None, built.notices), f"evaluating {what}"):
            _tell(line, world)
        evaluation = built.evaluator.run()
        if world.is_main:
            checkpoint = str(built.slot) if built.slot else None
            found = {"checkpoint": checkpoint, "step": built.step, **json_value(evaluation.metrics)}
            print(json.dumps(found, indent=1, allow_nan=False), flush=True)
        if not evaluation.valid:
            raise RawloopError(f"the loss is not finite in batches of {', '.join(evaluation.bad_ids)}")


def _tell(line: str, world: World) -> None:
    if world.is_main:
        print(f"rawloop evaluate: {line}", file=sys.stderr, flush=True)


class Built(NamedTuple):
    """An evaluator, and the checkpoint that it evaluates: None is the base model. Empty notices are not printed."""

    slot: Path | None
    step: int | None
    evaluator: Evaluator
    base: BaseFingerprint
    contents: Contents
    notices: list[str]


def _build(config: RunConfig, checkpoint: str | None, world: World) -> Built:
    data = read_data(config, build_family(config), "eval")
    for line in data.notices:
        _tell(line, world)
    slot = None if checkpoint is None else slot_of(Path(expanduser(config.output)), checkpoint)
    family, contents = data.family, data.contents()
    notices, step = [clock_notice(family)], None
    if slot is not None:
        notices.append(check_reading(stored_settings(slot) or {}, contents.of_run()))
        step = read_manifest(slot).step
    precision = stored_part(slot, "precision", tensors=False) if slot is not None else None
    try:
        model, policy, base = build_model(config, world, family, [], precision)
    except OtherMode as error:  # its advice is for training
        assert precision is not None
        mode = precision["mode"]
        raise UserError(
            f"the checkpoint was trained with precision.mode '{mode}', this evaluation has '{config.precision.mode}': "
            f"pass --precision.mode {mode}"
        ) from error
    if slot is not None:
        files = ModelFiles(model, family.load_model)
        if not (slot / files.folder).is_dir():
            raise UserError(
                f"{slot} has no {files.folder}/: adapter.mode is '{config.adapter.mode}', the run's was not"
            )
        base.load_state_dict(stored_part(slot, "base"))
        files.load(slot / files.folder)
    limits = Limits.of(family, model)
    limits.learn(family, model, policy.device, policy.autocast)
    loader = build_loader(config, data, "data.eval", limits, world)
    evaluator = build_evaluator(config, data, loader, LossModule(model, family.losses), policy, world)
    return Built(slot, step, evaluator, base, contents, notices)


def slot_of(run_folder: Path, checkpoint: str) -> Path:
    """Return the folder of `best`, `latest` or a named checkpoint, and verify all its files."""
    by_role = checkpoint in ("best", "latest")
    slot, damage = resolve(run_folder / checkpoint if by_role else Path(expanduser(checkpoint)))
    if slot is None and damage:
        raise CheckpointError(f"no checkpoint of {run_folder} is whole: {damage}")
    if slot is None or (by_role and not slot.is_dir()):
        raise UserError(
            f"--checkpoint is '{checkpoint}', and there is none in {run_folder}: is --output that of the run?"
        )
    if damage:
        print(f"rawloop evaluate: skipped a damaged checkpoint: {damage}", file=sys.stderr, flush=True)
    if not (slot / MANIFEST).is_file() and not (slot.is_dir() and is_slot_name(slot)):
        raise UserError(
            f"--checkpoint is '{checkpoint}', which is no checkpoint's folder (it has no {MANIFEST}): pass best, "
            "latest, or a folder such as runs/x/checkpoints/step-00000500"
        )
    verify(slot)
    return slot
