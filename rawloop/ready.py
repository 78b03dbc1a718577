"""What a rank has before a run: model, policy, data and plan. One trial pass has chosen the precision mode.

`rawloop train` makes a run of it; checks and measurements use it as it is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from rawloop.adapters.files import ModelFiles
from rawloop.adapters.fingerprint import BaseFingerprint
from rawloop.cadences import cadence_notices
from rawloop.changes import Contents, check_settings_of_ranks
from rawloop.components import (
    Data,
    build_evaluator,
    build_family,
    build_loader,
    build_policy,
    load_model,
    prepare_model,
    read_data,
)
from rawloop.config import RunConfig
from rawloop.contracts import Batch
from rawloop.data.batches import Loader, Plan
from rawloop.data.limits import Limits
from rawloop.data.workers import SPARE, check_descriptors
from rawloop.diagnose.checks import Report, run_checks
from rawloop.dist import World
from rawloop.errors import RawloopError, UserError, first_few
from rawloop.evaluate import Evaluator, check_best_metric
from rawloop.families.chat_template import clock_notice
from rawloop.listen.listener import Listener
from rawloop.listening import build_listener
from rawloop.losses import LossModule
from rawloop.planning import build_plan, evaluation_groups, plan_lines, within_memory
from rawloop.precision.policy import PrecisionPolicy
from rawloop.precision.preflight import Trial, preflight
from rawloop.rebuild import trial_loss
from rawloop.sharded import shard_model, sharded_line, to_be_sharded
from rawloop.sizing import what_would_fit
from rawloop.weights import Source, find_source, load_weights

Say = Callable[[str], None]


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
        self.limits.learn(self.data.family, self.module, self.policy.device, self.policy.autocast)
        return trial_loss(self.module, self.first(), self.policy.device)

    def first(self) -> Batch:
        """Return the first micro-batch."""
        return self.train.batches.made(self.plan.micro_batches(0)[0])[1]

    def check(self, config: RunConfig, world: World) -> Report:
        """Run the checks of a new run."""
        return run_checks(config.checks, self.data.family, self.module, self.examples, self.policy.autocast, world)


def build_ready(
    config: RunConfig, world: World, say: Say, precision: dict[str, Any] | None, source: Source | None
) -> tuple[Ready, Trial]:
    """Build what needs no other rank, under one agreement. Then compare it over the ranks, and try one pass.

    A model that is to be sharded is sharded in between, from the CPU, so that no device ever holds all of it.
    """
    ready = world.on_all_ranks(partial(_prepare_rank, config, world, say, precision, source))
    assert ready is not None
    ready.contents.check_ranks(ready.base, world)
    if to_be_sharded(config, world):
        _shard(config, ready, source, say)
    modes = world.gather(ready.policy.name)
    if len(set(modes)) > 1:
        raise UserError(
            f"precision.mode '{config.precision.mode}' became {modes} on ranks of different hardware: name "
            "one mode for all"
        )
    ready.module.train()
    first, fix = f"a micro-batch of the samples {ready.first_ids()}", partial(what_would_fit, config, world)
    sharded = ready.policy.block_runs is not None
    trial = within_memory(partial(preflight, ready.policy, ready.first_loss), world, first, fix, sharded)
    say(f"precision: {'; '.join([f'{ready.policy.name} ({ready.policy.reason})', *ready.policy.remedies])}")
    return ready, trial


def _shard(config: RunConfig, ready: Ready, source: Source | None, say: Say) -> None:
    """Shard a loaded model over the ranks, and prepare its parts. All ranks call this."""
    policy, notices = ready.policy, list[str]()
    runs = shard_model(ready.module, ready.files, ready.listener, policy.world)
    if source is not None:
        load = partial(load_weights, source, ready.model, ready.base, ready.data.family)
        notices += policy.world.on_all_ranks(load) or []
    try:  # it reduces what it finds in weights, so a rank with an error of its own raises it at once
        prepare_model(config, ready.model, policy, ready.base, ready.data.family, None, notices, runs)
    except UserError as error:
        policy.world.raised_on_all(error)  # it is about the mode and the weights of all ranks
        raise
    for line in [*notices, sharded_line(config, policy)]:
        say(line)


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
    policy = build_policy(config, world, precision)
    model, base = load_model(config, world, family, notices)
    if not to_be_sharded(config, world):
        prepare_model(config, model, policy, base, family, source, notices)
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


def prepare(config: RunConfig, world: World) -> Ready:
    """Build what a new run starts with, and write nothing."""
    check_settings_of_ranks(config, world)
    source = find_source(config.init_from, world) if config.init_from else None
    return build_ready(config, world, lambda line: None, None, source)[0]
