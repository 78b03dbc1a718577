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
from rawloop.checkpoint.slots import read_manifest
from rawloop.cli import read_config
from rawloop.components import build_evaluator, build_family, build_loader, build_model, read_data
from rawloop.config import RunConfig, moved_run
from rawloop.data.limits import Limits
from rawloop.dist import World, open_world
from rawloop.errors import RawloopError, UserError
from rawloop.evaluate import Evaluator
from rawloop.families.chat_template import clock_notice
from rawloop.losses import LossModule
from rawloop.planning import evaluation_groups
from rawloop.precision.modes import OtherMode
from rawloop.records import json_value
from rawloop.trained import slot_of


def run(argv: list[str]) -> None:
    """Evaluate, and print one JSON object: what was evaluated, and its metrics. Fails if a loss is not finite."""
    parsed = read_config("evaluate", argv)
    config = parsed.config
    with open_world(config.device, config.ddp.timeout) as world:
        notice = moved_run(parsed)
        if notice:
            _tell(notice, world)
        check_settings_of_ranks(config, world)
        built = world.on_all_ranks(partial(_build, config, parsed.options.checkpoint, world))
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
    data = read_data(config, build_family(config), "eval", say=partial(_tell, world=world))
    for line in data.notices:
        _tell(line, world)
    slot = None
    if checkpoint is not None:
        slot = slot_of(Path(expanduser(config.output)), checkpoint, partial(_tell, world=world))
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
        notices.append(base.notice)
        files.load(slot / files.folder)
    limits = Limits.of(family, model)
    module = LossModule(model, family.losses)
    limits.learn(family, module, policy.device, policy.autocast)
    loader = build_loader(config, data, "data.eval", limits, world)
    groups = evaluation_groups(config, data, contents)
    evaluator = build_evaluator(config, data, loader, module, policy, world, groups)
    return Built(slot, step, evaluator, base, contents, notices)
