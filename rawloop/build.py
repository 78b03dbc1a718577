"""Builds the objects that the loop receives from a `RunConfig`.

The order matters twice. The precision policy casts the weights before DDP and the optimizer exist. Random streams are
restored last, because building draws from them.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import partial
from os.path import expanduser
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from rawloop.changes import PART, SettingsState, check_settings_of_ranks
from rawloop.checkpoint.best import BestTracker
from rawloop.checkpoint.manager import CheckpointManager
from rawloop.checkpoint.reader import stored_part
from rawloop.checkpoint.run_folder import mark_launch
from rawloop.compiling import compile_blocks
from rawloop.components import build_optimizer, build_throughput, decide_find_unused
from rawloop.config import RunConfig, to_yaml
from rawloop.contracts import Family
from rawloop.data.batches import TrainWindows
from rawloop.diagnose.checks import Report
from rawloop.dist import World, unwrap_ddp
from rawloop.errors import LibraryError, RawloopError
from rawloop.loop import Run
from rawloop.losses import LossModule, Meter
from rawloop.moving_buffers import MovingBuffers, buffer_notices, find_moving_buffers
from rawloop.optim import check_optimizer, lr_at
from rawloop.optim_state import NamedOptimizerState
from rawloop.planning import rehearse
from rawloop.precision.advice import rounded_updates
from rawloop.precision.modes import DTYPES, MODES
from rawloop.precision.policy import PrecisionPolicy
from rawloop.ready import Ready, build_ready, prepare
from rawloop.records import Records
from rawloop.resume import Start, choose_start, goes_back, restore
from rawloop.run import TrainState
from rawloop.seed import RngState
from rawloop.settings import DDPConfig
from rawloop.sinks import check_packages, check_sinks
from rawloop.sizing import what_would_fit
from rawloop.watched import build_watch

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
    ready, trial = build_ready(config, world, say, precision, start.source)
    whole = ready.policy.block_runs is None
    switches = config.ddp if whole else replace(config.ddp, find_unused_parameters="auto")  # only DDP reads it
    ddp, notice = decide_find_unused(switches, world.gather(trial.unused))
    buffers = find_moving_buffers(ready.model, trial.moves, world, watch=not ddp.broadcast_buffers)
    ready.files.add_moving(buffers.places)
    report = _check(config, folder, world, ready, say) if start.slot is None else None
    throughput = build_throughput(config, ready.data, ready.first, ready.module, ready.policy, say)
    optimizer = build_optimizer(config, ready.policy, world)
    if config.model.compile:
        compiling = partial(compile_blocks, config, ready.module, ready.first, ready.policy, say)
        # In the pass of a sharded model a rank raises its error at once: the others may be inside of it.
        world.on_all_ranks(compiling) if whole else compiling()
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
        if config.watch.enabled:
            run.watch = build_watch(run, folder, config.watch, to_yaml(config))
    except BaseException:
        run.close()
        raise
    return run


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


def announce(
    config: RunConfig, family: Family, module: nn.Module, policy: PrecisionPolicy, optimizer: Optimizer
) -> str:
    """Return a line that says what is trained in which dtypes, and by which attention, read from the finished module.

    Refuse a module whose trained weights are not those of the policy and the optimizer, or are of another dtype.
    """
    wrapped = unwrap_ddp(module)
    assert isinstance(wrapped, LossModule)
    named = dict(wrapped.model.named_parameters())
    trained = {name: weight for name, weight in named.items() if weight.requires_grad}
    stepped = dict(policy.named_parameters())
    optimized = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    without = {name for name, weight in stepped.items() if id(weight) not in optimized}
    for what, names in (
        ("are trained by the model and not by the precision policy", set(trained) - set(stepped)),
        ("are trained by the precision policy and not by the model", set(stepped) - set(trained)),
        ("are trained, and the optimizer does not hold them", without),
    ):
        if names:
            raise RawloopError(f"{len(names)} weights {what}, first {min(names)}: this is not what was asked for")
    wanted = config.precision.trainable_dtype if policy.name == config.precision.mode else "auto"
    allowed = MODES[policy.name].trainable if wanted == "auto" else (wanted,)
    for name, weight in trained.items():
        if weight.dtype not in {DTYPES[kind] for kind in allowed}:
            raise RawloopError(
                f"{name} would be trained in {_short(weight.dtype)}, and precision {policy.name} trains "
                f"{' or '.join(allowed)}"
            )
    frozen = [weight for name, weight in named.items() if name not in trained]
    streams = ", ".join(f"{stream} x {weight:g}" for stream, weight in family.stream_weights.items())
    kept = f", beside {_dtypes(frozen)} frozen" if frozen else ""
    used = [getattr(getattr(part, "config", None), "_attn_implementation", None) for part in wrapped.model.modules()]
    attention = ", ".join(dict.fromkeys(filter(None, used)))
    said = f"; attention: {attention}" if attention else ""
    rounded = rounded_updates(policy.trained, optimizer)
    return f"training {_dtypes(trained.values())} weights{kept}{rounded}; streams: {streams}{said}"


def _dtypes(weights: Iterable[nn.Parameter]) -> str:
    """Return the number of weights of each dtype, such as `1,536 float32`."""
    counts: Counter[str] = Counter()
    for weight in weights:
        counts[_short(weight.dtype)] += weight.numel()
    return " and ".join(f"{count:,} {kind}" for kind, count in counts.most_common())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
