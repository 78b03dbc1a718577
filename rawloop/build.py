"""Assembly: small functions that turn a `RunConfig` into the finished objects that the loop receives.

Order matters twice: the precision policy casts weights before DDP and the optimizer exist, and random streams are
restored last, because building things draws from them.
"""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from os.path import expanduser
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from rawloop.adapters import BaseFingerprint, ModelFiles, add_adapter
from rawloop.announced import announce, check_streams
from rawloop.audio import import_torchaudio
from rawloop.buffers import MovingBuffers, in_words, settle_moves, untouched
from rawloop.changes import PART, SettingsState
from rawloop.checkpoint import (
    BestTracker,
    CheckpointManager,
    mark_launch,
)
from rawloop.config import RunConfig
from rawloop.contracts import CodecFamily, Family, HearingFamily, IdsFamily, PackingFamily, Sample
from rawloop.data import DataConfig, codes_folder
from rawloop.data.batches import BatchPlan, Draw, EvalBatches, Loader, MicroBatches, TrainWindows
from rawloop.data.codes import CodeCache
from rawloop.data.limits import Limits, look_ups
from rawloop.data.prepare import decode_once, prepare
from rawloop.data.samples import named, read_samples, shared, usable
from rawloop.data.shards import heard_at
from rawloop.diagnose import Report, run_checks
from rawloop.dist import DDPConfig, World
from rawloop.errors import BadSample, LibraryError, RawloopError, UserError
from rawloop.evaluate import Evaluator, check_best_metric
from rawloop.facts import Contents, check_settings_of_ranks, contents_of
from rawloop.families import load_family
from rawloop.families.clock import check_repeatable, clock_notice
from rawloop.loop import Run, TrainState, trial_loss
from rawloop.losses import LossModule
from rawloop.meter import Meter
from rawloop.optim import build_optimizer, lr_at
from rawloop.optim_state import NamedOptimizerState
from rawloop.precision import PrecisionPolicy, preflight
from rawloop.preempt import Preemption
from rawloop.records import Records, check_packages
from rawloop.resume import Claim, claim, restore, stored_precision
from rawloop.seed import RngState, seed_all
from rawloop.unused import decide_find_unused
from rawloop.weights import Source, find_source, load_weights

Say = Callable[[str], None]
HEARD_RATE = 16_000  # Hz at which clips are looked at for a family that does not say at which it hears them


def build_run(config: RunConfig, world: World, say: Say) -> Run:
    """Build a run and restore it from a checkpoint if the config asks for it. Errors on any rank are raised on all.

    Args:
        config: the whole configuration.
        world: the ranks; the process group is open.
        say: prints a line for the user (on rank 0 only).

    Raises:
        UserError: anything in config, data or model that cannot work, before anything is trained or written over.
        CheckpointError: the checkpoint to resume from is damaged or does not fit.
        Preempted: this launch was told to stop before its processes were started again.
    """
    folder = Path(expanduser(config.output))
    check_settings_of_ranks(config, world)
    claimed = claim(folder, config, world, say)
    try:
        return _build_run(config, folder, world, say, claimed)
    except BaseException as error:
        begun = (folder / "events.jsonl").exists()
        if isinstance(error, LibraryError) and begun:
            error.folder = folder
        if claimed.lock:
            claimed.lock.release(begun=begun)
        raise


def _build_run(config: RunConfig, folder: Path, world: World, say: Say, claimed: Claim) -> Run:
    # Local work first and under one agreement; whatever needs all ranks together comes after it.
    precision = world.from_main(stored_precision(claimed.slot))
    ready = world.on_all_ranks(partial(_prepare_run, config, world, say, precision, claimed.source))
    assert ready is not None
    ready.contents.check_ranks(ready.base, world)
    modes = world.gather(ready.policy.name)
    if len(set(modes)) > 1:
        raise UserError(
            f"precision.mode '{config.precision.mode}' became {modes} on ranks of different hardware: name "
            "one mode for all"
        )
    ready.module.train()
    trial = preflight(ready.policy, ready.first_loss)
    say(f"precision: {ready.policy.name} ({ready.policy.reason})")
    ddp, notice = decide_find_unused(config.ddp, world, trial.unused)
    buffers = settle_moves(ready.model, trial.moves, world, watch=not ddp.broadcast_buffers)
    ready.policy.every_gradient = world.size > 1 and not ddp.find_unused_parameters
    report = _check(config, folder, world, ready, say) if claimed.slot is None else None
    if not claimed.beginning.restarted:  # from here on something of the run stands in its folder
        world.on_all_ranks(partial(mark_launch, folder, world, "claimed"), only_main=True)
    run = _assemble(config, folder, world, ready, ddp, claimed, buffers)
    model = run.checkpoints.parts.folders["model"] if run.checkpoints else None
    moving = in_words(buffers, trial.moves, model.beside() if isinstance(model, ModelFiles) else {})
    for line in [*moving, *([notice] if notice else []), *ready.notices] if world.is_main else ():
        run.records.event("warning", step=0, reason=line)
    try:
        say(announce(config, ready.family, run.module, run.policy, run.optimizer))
        restore(run, config, claimed, say)
        if report is not None:
            world.on_all_ranks(partial(report.record, run.records), only_main=True)
    except BaseException:
        run.close()
        raise
    return run


@dataclass
class Ready:
    """What one rank has made on its own, before the ranks do anything together."""

    family: Family
    model: nn.Module
    policy: PrecisionPolicy
    module: LossModule
    base: BaseFingerprint
    plan: BatchPlan
    contents: Contents
    notices: list[str]  # about the data
    train: Loader
    evaluator: Evaluator | None
    limits: Limits

    def examples(self, start: int, stop: int) -> list[list[Any]]:
        """Make the examples of this rank's micro-batches from one number up to another, as far as the data goes.

        Returns:
            a list per micro-batch.
        """
        groups: list[list[Any]] = []
        for number in range(start, stop):
            window, micro = divmod(number, self.plan.accumulation)
            draws = [draw for draw in self.plan.micro_batches(window)[micro] if not draw.epoch]
            groups += [self.train.batches.made(draws)[0]] if draws else []
        return groups

    def first_loss(self) -> Tensor:
        """The sum of the first micro-batch's losses, for the precision policy's trial; first its ids are looked at.

        Raises:
            UserError: it holds what the model cannot take.
        """
        learn_limits(self.limits, self.family, self.model, self.policy)
        first = self.train.batches.made(self.plan.micro_batches(0)[0])[1]
        return trial_loss(self.module, first, self.policy.device)


def _prepare_run(
    config: RunConfig, world: World, say: Say, precision: dict[str, Any] | None, source: Source | None
) -> Ready:
    import_torchaudio()
    if config.ddp.static_graph and config.train.accumulation > 1:
        raise UserError(
            f"ddp.static_graph is true and train.accumulation is {config.train.accumulation}: DDP fails on a static "
            "graph whose first micro-batch is not synchronised; set one of them back"
        )
    check_packages(config.records)
    family = build_family(config)
    if config.evaluation.enabled:
        check_best_metric(config.evaluation.best_metric, list(family.streams))
    cache = open_codes(config.data, family)
    of_data: list[str] = []

    def note(line: str) -> None:
        say(line)
        of_data.append(line)

    train_samples = load_samples(config, family, cache, "train", note)
    eval_samples = load_samples(config, family, cache, "eval", note) if config.evaluation.enabled else []
    if same := shared(train_samples, eval_samples):
        note(
            f"data.eval: {same} of its {len(eval_samples)} samples are also trained on: for these eval_loss "
            "does not measure unseen data; keep the two sets apart"
        )
    plan = BatchPlan(
        num_samples=len(train_samples),
        batch_size=config.train.batch_size,
        accumulation=config.train.accumulation,
        world_size=world.size,
        rank=world.rank,
        seed=config.seed,
        shuffle=config.data.shuffle,
    )
    for line in beyond_the_end(config, config.train.max_steps or plan.windows(config.train.epochs)):
        say(line)
    notices: list[str] = []
    model, policy, base = build_model(config, world, family, notices, precision, source)
    for notice in filter(None, [*notices, clock_notice(family)]):
        say(notice)
    module = LossModule(model, family.losses)
    limits = limits_of(family, model)
    evaluator = None
    if config.evaluation.enabled:
        evaluator = build_evaluator(config, family, module, policy, limits, cache, eval_samples, world)
    train = _loader(config, family, limits, cache, train_samples, world)
    first = train.batches[plan.micro_batches(0)[0]]
    if isinstance(first, RawloopError):
        raise first
    read = {"data.train": train_samples, **({"data.eval": eval_samples} if config.evaluation.enabled else {})}
    contents = contents_of(family, cache, read)
    return Ready(family, model, policy, module, base, plan, contents, of_data, train, evaluator, limits)


def beyond_the_end(config: RunConfig, total: int) -> Iterator[str]:
    """Yield a line for each setting that a run of so many steps ends before. A short trial of a long run has them."""
    optim, evaluation = config.optim, config.evaluation
    if optim.warmup_steps > total:
        yield (
            f"optim.warmup_steps is {optim.warmup_steps}, and the run ends at step {total}: the learning rate comes to "
            f"{lr_at(total - 1, total, optim):.3g} and never to optim.lr, {optim.lr:.3g}"
        )
    if evaluation.enabled and evaluation.every > total:
        yield (
            f"evaluation.every is {evaluation.every}, and the run ends at step {total}: it is evaluated at step 0 and "
            "at the end only"
        )


def _check(config: RunConfig, folder: Path, world: World, ready: Ready, say: Say) -> Report | None:
    """Check a new run's labels, first loss and causality, before anything of a run stands in its folder.

    So the same command, with a key that lets a finding pass, can be given again. A run that is stopped leaves its
    census behind.
    """
    if not config.checks.enabled:
        return None
    report = _report(config, world, ready)
    say(report.text())
    if report.problems():
        world.on_all_ranks(partial(report.write_census, folder), only_main=True)
        world.on_all_ranks(report.stop_if_wrong, only_main=True)
    return report


def _report(config: RunConfig, world: World, ready: Ready) -> Report:
    return run_checks(config.checks, ready.family, ready.module, ready.examples, ready.policy, world)


def check_run(config: RunConfig, world: World) -> Report:
    """Run the checks of a new run and nothing else: what they find is returned, whatever it is, and written nowhere.

    Raises:
        UserError: anything in config, data or model that cannot work.
    """
    check_settings_of_ranks(config, world)
    source = find_source(config.init_from, world) if config.init_from else None
    ready = world.on_all_ranks(partial(_prepare_run, config, world, lambda line: None, None, source))
    assert ready is not None
    ready.contents.check_ranks(ready.base, world)
    ready.module.train()
    preflight(ready.policy, ready.first_loss)
    return _report(config, world, ready)


def _assemble(
    config: RunConfig,
    folder: Path,
    world: World,
    ready: Ready,
    ddp: DDPConfig,
    claimed: Claim,
    buffers: MovingBuffers,
) -> Run:
    # It may refuse; records make a run of the folder.
    model = ModelFiles(ready.model, ready.family.load_model, ready.base, buffers.places)
    policy, records = ready.policy, Records(folder, world, config.records)
    policy.say = lambda reason: records.event("warning", step=0, reason=reason) if world.is_main else None
    optimizer = build_optimizer(policy.named_parameters(), config.optim)
    policy.adopt(optimizer)
    total = config.train.max_steps or ready.plan.windows(config.train.epochs)
    state = TrainState()
    evaluation = config.evaluation
    best = BestTracker(evaluation.best_metric, evaluation.best_mode, evaluation.patience)
    meter = Meter()
    origin = claimed.source.state_dict() if claimed.source else None
    settings = SettingsState(config, world.size, ready.contents.of_run(), origin)
    parts: dict[str, Any] = {
        PART: settings,
        "base": ready.base,
        "model": model,
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
        policy=policy,
        optimizer=optimizer,
        lr=partial(lr_at, total=total, config=config.optim),
        total_steps=total,
        weights=ready.family.stream_weights,
        records=records,
        world=world,
        state=state,
        meter=meter,
        buffers=buffers,
        evaluator=ready.evaluator,
        checkpoints=CheckpointManager(folder, config.checkpoint, world, records, parts, claimed.lock),
        best=best,
        max_norm=config.optim.max_norm,
        log_every=config.train.log_every,
    )


def build_family(config: RunConfig) -> Family:
    """Return the family of the configured model, told how to make batches.

    Raises:
        UserError: there is no such family, or it cannot do what the data's config asks for.
    """
    family = load_family(config.model)
    check_streams(config, family)
    if config.data.packing:
        if not isinstance(family, PackingFamily):
            raise UserError(
                f"data.packing is true, and the family {type(family).__name__} cannot pack: set it to false; samples "
                "are then padded to the longest of their micro-batch"
            )
        family.packing = True
    return family


def prepare_codes(
    config: DataConfig, family: Family, device: torch.device, preemption: Preemption | None = None
) -> str:
    """Encode the clips of both splits that the cache does not have yet, and return a line about it.

    For a model that hears clips as they are, they are decoded once.

    Raises:
        BadClips: clips that cannot be used, each named with its reason.
        Preempted: a signal ended it; what was encoded is kept.
    """
    import_torchaudio()
    if not isinstance(family, CodecFamily | HearingFamily):
        raise UserError(f"models of the family {type(family).__name__} need no codes: train without `rawloop prepare`")
    splits = [path for path in (config.train, config.eval) if path is not None]
    samples = [sample for path in splits for sample in read_samples(path, config, notice=_warn)]
    skip = config.on_bad_sample == "skip"
    samples, bad = usable(samples, family.check, skip)
    codec, encode = (
        family.load_codec(device) if isinstance(family, CodecFamily) else (heard_at(family.sample_rate), None)
    )
    report = prepare(samples, encode, codec, codes_folder(config), config, preemption=preemption)
    cache = CodeCache(codes_folder(config), codec.hash, config)
    bad |= usable(cache.usable(samples)[0], partial(family.check, frames=cache.frames), skip)[1]
    of, done = ("codes of ", "encoded") if encode else ("", "decoded")
    counts = f"{report.encoded} {done} now, {report.reused} already there, {len(report.bad)} left out"
    others = f"; {len(bad)} samples that the model cannot take are left out: {named(bad)}" if bad else ""
    return f"{of}{report.clips} clips in {report.folder}: {counts}{others}"


def _warn(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def open_codes(config: DataConfig, family: Family) -> CodeCache | None:
    """Open the cache of codes that `rawloop prepare` wrote; None for a family that needs none.

    Raises:
        UserError: there is no cache, or it is of another codec.
    """
    return CodeCache(codes_folder(config), family.codec_hash(), config) if isinstance(family, CodecFamily) else None


def load_samples(config: RunConfig, family: Family, cache: CodeCache | None, split: str, say: Say) -> list[Sample]:
    """Read one split of the data and check every sample: that the model can take it and its clips are encoded.

    Raises:
        UserError: the split is not configured, empty or broken, a sample cannot be trained, or is not prepared.
    """
    path = getattr(config.data, split)
    if not path:
        off = ", or switch evaluation off with --evaluation.enabled false" if split == "eval" else ""
        raise UserError(f"data.{split} is not set: give a folder with metadata.json or a JSONL file{off}")
    # with codes, training needs no audio
    samples = read_samples(path, config.data, check_files=cache is None, notice=say)
    number, frames = len(samples), None
    left_out: dict[str, str] = {}
    if cache is None and any(sample.audio_paths() for sample in samples):
        cache = _heard(samples, config.data, family)
    if cache is not None:
        samples, left_out = cache.usable(samples)
        cache.check(samples)
        frames = cache.frames if isinstance(family, CodecFamily | HearingFamily) else None
    samples, bad = usable(samples, lambda one: family.check(one, frames), config.data.on_bad_sample == "skip")
    left_out |= bad
    if not samples:
        raise UserError(f"data.{split} is '{path}', of which no sample can be used: {named(left_out)}")
    if left_out:
        say(
            f"data.{split}: {len(left_out)} of {number} samples left out, as data.on_bad_sample skip asks for, here or "
            f"in `rawloop prepare`: {named(left_out)}"
        )
    return samples


def _heard(samples: list[Sample], config: DataConfig, family: Family) -> CodeCache:
    """Decode all clips of a model that takes no codes, if that was not done before: no run shall end in the middle."""
    for sample in samples:
        with suppress(BadSample):  # looked at again when the lengths of clips are known
            family.check(sample)
    rate = family.sample_rate if isinstance(family, HearingFamily) else HEARD_RATE
    return decode_once(samples, codes_folder(config), rate, config)


def build_model(
    config: RunConfig,
    world: World,
    family: Family,
    notices: list[str],
    precision: dict[str, Any] | None = None,
    source: Source | None = None,
) -> tuple[nn.Module, PrecisionPolicy, BaseFingerprint]:
    """Load the model, add its adapter, cast it and put it on its device. The same seed on all ranks: same weights.

    Args:
        config: the whole configuration.
        world: the ranks.
        family: knows how the model is loaded.
        notices: gets a line for everything that the user should know.
        precision: what `stored_precision` said of the checkpoint that will be restored.
        source: whose weights the model starts from.

    Returns:
        the model, its precision policy, and what identifies the weights that the adapter stands on.
    """
    if not world.is_main or not sys.stderr.isatty():  # a bar in a log file is thousands of blanks
        transformers.utils.logging.disable_progress_bar()
    policy = PrecisionPolicy(config.precision, world.device, world.any, resume=precision)
    seed_all(config.seed, 0)
    model = add_adapter(family.load_model(), config.adapter, notices, config.model.revision)
    base = BaseFingerprint(model, config.model.path, config.model.revision, config.seed)
    if source is not None:
        notices += load_weights(source, model, base, family)
    model = policy.prepare(model)
    seed_all(config.seed, world.rank)
    return model, policy, base


def build_evaluator(
    config: RunConfig,
    family: Family,
    module: LossModule,
    policy: PrecisionPolicy,
    limits: Limits,
    cache: CodeCache | None,
    samples: list[Sample],
    world: World,
) -> Evaluator:
    """Build the evaluator over this rank's share of the samples."""
    loader = _loader(config, family, limits, cache, samples, world)
    size = config.evaluation.batch_size
    batches = EvalBatches(loader, len(samples), size, rank=world.rank, world_size=world.size)
    return Evaluator(config.evaluation, module, batches, policy, world, family.stream_weights)


def _loader(
    config: RunConfig, family: Family, limits: Limits, cache: CodeCache | None, samples: list[Sample], world: World
) -> Loader:
    example = partial(family.example, codes=cache or no_codes)
    batches = MicroBatches(samples, example, family.collate, limits.fault, config.seed)
    firsts = [Draw(index, epoch=0) for index in range(min(2, len(samples)))]
    check_repeatable(lambda: batches.made(firsts)[1])
    return Loader(batches, config.data.num_workers, pin_memory=world.device.type == "cuda")


def limits_of(family: Family, model: nn.Module) -> Limits:
    """What batches of a model may hold: ids that it has an embedding for, targets that the family's heads can name.

    A token beyond the embedding is no mistake where the family's own probe has it: some models put audio in its place
    before they look anything up.
    """
    classes = {stream: round(math.exp(nats)) for stream, nats in family.chance().items()}
    ids = dict(family.num_ids) if isinstance(family, IdsFamily) else {}
    table, tokens = _embedding(model), family.probe().inputs.get("input_ids")
    if table is not None:
        ids["input_ids"] = max(len(table), int(tokens.max()) + 1 if tokens is not None else 0)
    return Limits(ids, classes)


def learn_limits(limits: Limits, family: Family, model: nn.Module, policy: PrecisionPolicy) -> None:
    """Run the family's probe on the prepared model, to see which further inputs are ids of an embedding."""
    found: dict[str, int] = {}
    probe = family.probe().to(policy.device)
    with untouched(model, training=False), torch.no_grad(), policy.autocast(), look_ups(model, probe.inputs, found):
        family.logits(model, probe)
    limits.ids.update({name: rows for name, rows in found.items() if name not in limits.ids})


def _embedding(model: nn.Module) -> Tensor | None:
    """The weight of the input embedding, of models that have one."""
    try:
        weight = model.get_input_embeddings().weight  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return weight if isinstance(weight, Tensor) else None


def no_codes(path: Path) -> Tensor:
    """Stands for the cache of codes where a family needs none."""
    raise AssertionError(f"codes of {path} were asked for by a family that has no codec")
