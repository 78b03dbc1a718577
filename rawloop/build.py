"""Builds the objects that the loop receives from a `RunConfig`.

The order matters twice. The precision policy casts the weights before DDP and the optimizer exist. Random streams are
restored last, because building draws from them.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from os.path import expanduser
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rawloop.adapters.files import ModelFiles
from rawloop.adapters.fingerprint import BaseFingerprint
from rawloop.buffers import MovingBuffers, buffer_notices, find_moving_buffers
from rawloop.cadences import cadence_notices
from rawloop.changes import PART, Contents, SettingsState, check_settings_of_ranks
from rawloop.checkpoint.best import BestTracker
from rawloop.checkpoint.manager import CheckpointManager
from rawloop.checkpoint.reader import stored_part
from rawloop.checkpoint.run_folder import mark_launch
from rawloop.compiling import compile_blocks
from rawloop.components import (
    Data,
    announce,
    build_evaluator,
    build_family,
    build_loader,
    build_model,
    build_optimizer,
    build_throughput,
    decide_find_unused,
    read_data,
)
from rawloop.config import RunConfig, to_yaml
from rawloop.contracts import Batch
from rawloop.data.batches import Loader, Plan, TrainWindows
from rawloop.data.limits import Limits
from rawloop.data.workers import SPARE, check_descriptors
from rawloop.diagnose.checks import Report, run_checks
from rawloop.dist import World
from rawloop.errors import LibraryError, RawloopError, UserError, first_few
from rawloop.evaluate import Evaluator, check_best_metric
from rawloop.families.chat_template import clock_notice
from rawloop.listen.listener import Listener
from rawloop.listening import build_listener
from rawloop.loop import Run
from rawloop.losses import LossModule, Meter
from rawloop.optim import check_optimizer, lr_at
from rawloop.optim_state import NamedOptimizerState
from rawloop.planning import build_plan, evaluation_groups, plan_lines, rehearse, within_memory
from rawloop.precision.policy import PrecisionPolicy
from rawloop.precision.preflight import Trial, preflight
from rawloop.rebuild import trial_loss
from rawloop.records import Records
from rawloop.resume import Start, choose_start, goes_back, restore
from rawloop.run import TrainState
from rawloop.seed import RngState
from rawloop.settings import DDPConfig
from rawloop.sharded import shard_model, to_be_sharded
from rawloop.sinks import check_packages, check_sinks
from rawloop.sizing import what_would_fit
from rawloop.watched import build_watch
from rawloop.weights import Source, find_source

Say = Callable[[str], None]


def build_run(config: RunConfig, world: World, say: Say, claimed: Callable[[], None] = lambda: None) -> Run:
    """Build a run, and restore it from a checkpoint if the config says so. `say` prints a line on rank 0.
    `claimed` is called on every rank once the run folder is this run's.

    Raises:
        UserError: config, data or model are wrong; on all ranks, before anything is trained or overwritten.
        CheckpointError: the checkpoint is damaged, or does not fit the run.
        Preempted: torchrun has restarted a run that was stopped on purpose.
    """
    folder = Path(expanduser(config.output))
    check_settings_of_ranks(config, world)
    start = choose_start(folder, config, world, say)
    try:
        world.on_all_ranks(claimed)
        return _build_run(config, folder, world, say, start)
    except BaseException as error:
        started = (folder / "events.jsonl").exists()
        if isinstance(error, LibraryError) and started:
            error.folder = folder
        if start.lock:
            start.lock.release(started=started)
        raise


def _build_run(config: RunConfig, folder: Path, world: World, say: Say, start: Start) -> Run:
    precision = world.from_main(stored_part(start.slot, "precision", tensors=False) if start.slot else None)
    # A resumed run goes on without its sinks: the server may be away.
    world.on_all_ranks(partial(check_packages if start.slot else check_sinks, config.records), only_main=True)
    world.on_all_ranks(partial(check_optimizer, config.optim, world.device))
    fix = partial(what_would_fit, config, world)
    ready, trial = _prepare(config, world, say, precision, start.source)
    ddp, notice = decide_find_unused(config.ddp, world.gather(trial.unused))
    buffers = find_moving_buffers(ready.model, trial.moves, world, watch=not ddp.broadcast_buffers)
    ready.files.add_moving(buffers.places)
    report = _check(config, folder, world, ready, say) if start.slot is None else None
    throughput = build_throughput(config, ready.data, ready.first, ready.module, ready.policy, say)
    shard_model(config, ready.module, ready.policy, ready.files, world, say)
    optimizer = build_optimizer(config, ready.policy, world)
    if config.model.compile:
        world.on_all_ranks(partial(compile_blocks, config, ready.module, ready.first, ready.policy, say))
    if config.train.rehearse:
        rehearse(config, ready.data, ready.train.batches, ready.plan, ready.module, ready.policy, say, fix)
    if not goes_back(folder, config.resume):  # else a restart must go back too, until later checkpoints are set aside
        world.on_all_ranks(partial(mark_launch, folder, world), only_main=True)
    run = _assemble(config, folder, world, ready, optimizer, ddp, start, buffers)
    run.throughput, run.what_would_fit = throughput, fix
    moving = buffer_notices(buffers, trial.moves, ready.files.extra_buffers())
    for line in [*moving, *([notice] if notice else []), *ready.data.notices] if world.is_main else ():
        run.records.event("warning", step=0, reason=line)
    try:
        say(announce(config, ready.data.family, run.module, run.policy, run.optimizer))
        restore(run, config, start, say)
        if report is not None:
            world.on_all_ranks(partial(report.record, run.records), only_main=True)
        if config.watch.enabled and not ready.files.is_sharded:
            run.watch = build_watch(run, folder, config.watch, to_yaml(config))
    except BaseException:
        run.close()
        raise
    return run


@dataclass
class Ready:
    """The objects that a rank builds without the other ranks."""

    data: Data
    contents: Contents
    model: nn.Module
    policy: PrecisionPolicy
    module: LossModule
    base: BaseFingerprint
    plan: Plan
    loaders: dict[str, Loader]  # by split
    evaluator: Evaluator | None
    limits: Limits
    total_steps: int
    listener: Listener | None
    files: ModelFiles

    @property
    def train(self) -> Loader:
        """The loader of the training set."""
        return self.loaders["data.train"]

    def examples(self, start: int, stop: int) -> list[list[Any]]:
        """Return the examples of this rank's micro-batches `start` to `stop`; fewer at the end of the data."""
        groups: list[list[Any]] = []
        for number in range(start, stop):
            window, micro = divmod(number, self.plan.accumulation)
            draws = [draw for draw in self.plan.micro_batches(window)[micro] if not draw.epoch]
            groups += [self.train.batches.made(draws)[0]] if draws else []
        return groups

    def first_ids(self) -> str:
        """Return the ids of the samples of the first micro-batch."""
        samples = self.data.samples["data.train"]
        return first_few(samples[draw.sample].id for draw in self.plan.micro_batches(0)[0])

    def first_loss(self) -> Tensor:
        """Check the first micro-batch's ids and return the sum of its losses, for the trial of the precision mode."""
        self.limits.learn(self.data.family, self.model, self.policy.device, self.policy.autocast)
        return trial_loss(self.module, self.first(), self.policy.device)

    def first(self) -> Batch:
        """Return the first micro-batch."""
        return self.train.batches.made(self.plan.micro_batches(0)[0])[1]

    def check(self, config: RunConfig, world: World) -> Report:
        """Run the checks of a new run."""
        return run_checks(config.checks, self.data.family, self.module, self.examples, self.policy.autocast, world)


def _prepare(
    config: RunConfig, world: World, say: Say, precision: dict[str, Any] | None, source: Source | None
) -> tuple[Ready, Trial]:
    """Build what needs no other rank, under one agreement. Then compare it over the ranks, and try one pass."""
    ready = world.on_all_ranks(partial(_prepare_rank, config, world, say, precision, source))
    assert ready is not None
    ready.contents.check_ranks(ready.base, world)
    modes = world.gather(ready.policy.name)
    if len(set(modes)) > 1:
        raise UserError(
            f"precision.mode '{config.precision.mode}' became {modes} on ranks of different hardware: name "
            "one mode for all"
        )
    ready.module.train()
    first, fix = f"a micro-batch of the samples {ready.first_ids()}", partial(what_would_fit, config, world)
    trial = within_memory(partial(preflight, ready.policy, ready.first_loss), world, first, fix)
    say(f"precision: {'; '.join([f'{ready.policy.name} ({ready.policy.reason})', *ready.policy.remedies])}")
    return ready, trial


def _prepare_rank(
    config: RunConfig, world: World, say: Say, precision: dict[str, Any] | None, source: Source | None
) -> Ready:
    if config.ddp.static_graph and config.train.accumulation > 1:
        raise UserError(
            f"ddp.static_graph is true and train.accumulation is {config.train.accumulation}: DDP fails on a static "
            "graph whose first micro-batch is not synchronised; set one of them back"
        )
    evaluates = config.evaluation.enabled
    if config.data.num_workers:
        check_descriptors(config.data.num_workers * (2 if evaluates else 1), SPARE)
    family = build_family(config)
    if evaluates:
        check_best_metric(config.evaluation.best_metric, list(family.streams))
    data = read_data(config, family, "train", *(["eval"] if evaluates else []), say=say)
    contents = data.contents()
    plan = build_plan(config, data, world, contents)
    groups = evaluation_groups(config, data, contents) if evaluates else None
    total = config.train.max_steps or plan.windows(config.train.epochs)
    lines = [*plan_lines(config, plan), *cadence_notices(config, total, plan.num_samples, plan.window_size)]
    for line in [*data.notices, *lines]:  # loading the model may take minutes
        say(line)
    notices: list[str] = []
    masters_on = torch.device("cpu") if to_be_sharded(config, world) else None
    model, policy, base = build_model(config, world, family, notices, precision, source, masters_on)
    for line in filter(None, [*notices, clock_notice(family)]):
        say(line)
    module = LossModule(model, family.losses)
    limits = Limits.of(family, model)
    loaders = {split: build_loader(config, data, split, limits, world) for split in data.samples}
    evaluator = None
    if evaluates:
        evaluator = build_evaluator(config, data, loaders["data.eval"], module, policy, world, groups)
    train = loaders["data.train"]
    first = train.batches[plan.micro_batches(0)[0]]
    if isinstance(first, RawloopError):
        raise first
    listener = build_listener(config, data, model, policy, world)
    contents.reading |= plan.facts()
    files = ModelFiles(model, family.load_model, base)
    return Ready(data, contents, model, policy, module, base, plan, loaders, evaluator, limits, total, listener, files)


def _check(config: RunConfig, folder: Path, world: World, ready: Ready, say: Say) -> Report | None:
    """Check a new run's labels, first loss and causality. If they stop the run, its folder has only a census.

    So the command can be given again, with a key that allows the finding.
    """
    if not config.checks.enabled:
        return None
    report = ready.check(config, world)
    say(report.text())
    if report.problems():
        world.on_all_ranks(partial(report.write_census, folder), only_main=True)
        world.on_all_ranks(report.stop_if_wrong, only_main=True)
    return report


def check_run(config: RunConfig, world: World) -> Report:
    """Run only the checks of a new run. Return their findings, and write nothing."""
    return prepare(config, world).check(config, world)


def prepare(config: RunConfig, world: World) -> Ready:
    """Build what a new run starts with, and write nothing."""
    check_settings_of_ranks(config, world)
    source = find_source(config.init_from, world) if config.init_from else None
    return _prepare(config, world, lambda line: None, None, source)[0]


def _assemble(
    config: RunConfig,
    folder: Path,
    world: World,
    ready: Ready,
    optimizer: Optimizer,
    ddp: DDPConfig,
    start: Start,
    buffers: MovingBuffers,
) -> Run:
    policy, records = ready.policy, Records(folder, world, config.records, settings=asdict(config))
    policy.say = lambda reason: records.event("warning", step=0, reason=reason) if world.is_main else None
    policy.adopt(optimizer)
    state, meter, evaluation = TrainState(), Meter(), config.evaluation
    best = BestTracker(evaluation.best_metric, evaluation.best_mode, evaluation.patience)
    origin = start.source.state_dict() if start.source else None
    parts: dict[str, Any] = {
        PART: SettingsState(config, world.size, ready.contents.of_run(), origin),
        "base": ready.base,
        "model": ready.files,
        # Options of the groups come from the config, which may have changed.
        "optimizer": NamedOptimizerState(optimizer, policy.named_parameters, restore_options=False),
        "precision": policy,
        "train": state,
        "meter": meter,
        "best": best,
        "rng": RngState(config.seed, world.rank),
    }
    return Run(
        module=world.wrap(ready.module, ddp),
        wrap=partial(world.wrap, ready.module, ddp),
        windows=TrainWindows(ready.train, ready.plan),
        num_samples=ready.plan.num_samples,
        policy=policy,
        optimizer=optimizer,
        lr=partial(lr_at, total=ready.total_steps, config=config.optim),
        total_steps=ready.total_steps,
        weights=ready.data.family.stream_weights,
        records=records,
        world=world,
        state=state,
        meter=meter,
        buffers=buffers,
        evaluator=ready.evaluator,
        listener=ready.listener,
        checkpoints=CheckpointManager(folder, config.checkpoint, world, records, parts, start.lock),
        best=best,
        max_norm=config.optim.max_norm,
        log_every=config.train.log_every,
        loaders=[*ready.loaders.values()],
    )
