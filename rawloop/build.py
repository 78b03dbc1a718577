"""Assembly: small functions that turn a `RunConfig` into the finished objects that the loop receives.

Order matters twice: the precision policy casts weights before DDP and the optimizer exist, and random streams are
restored last, because building things draws from them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from rawloop.adapters import ModelFiles, add_adapter
from rawloop.checkpoint import BestTracker, CheckpointManager, claim_run_folder, find_slots
from rawloop.checkpoint.disk import replace_text
from rawloop.checkpoint.manifest import NAME as MANIFEST
from rawloop.checkpoint.reader import check_slot
from rawloop.config import RunConfig, to_yaml
from rawloop.contracts import Family, Sample
from rawloop.data import DataConfig, codes_folder
from rawloop.data.audio import import_torchaudio
from rawloop.data.batches import BatchPlan, EvalBatches, Loader, MicroBatches, TrainWindows
from rawloop.data.codes import CodeCache
from rawloop.data.prepare import prepare
from rawloop.data.samples import read_samples
from rawloop.dist import LossModule, World
from rawloop.errors import UserError
from rawloop.evaluate import Evaluator
from rawloop.families import load_family
from rawloop.loop import Run, TrainState
from rawloop.optim import NamedOptimizerState, build_optimizer, lr_at
from rawloop.precision import PrecisionPolicy
from rawloop.records import Records
from rawloop.seed import RngState, seed_all

Say = Callable[[str], None]


@dataclass
class Prepared:
    """A model that is ready to be scored, and what it was made with."""

    family: Family
    model: nn.Module
    policy: PrecisionPolicy
    module: LossModule


def build_run(config: RunConfig, world: World, say: Say) -> Run:
    """Build a run, restored from a checkpoint if the config asks for it. Errors on any rank are raised on all.

    Args:
        config: the whole configuration.
        world: the ranks; the process group is open.
        say: prints a line for the user (on rank 0 only).

    Raises:
        UserError: anything in config, data or model that cannot work, before anything is trained or written over.
    """
    folder = Path(config.output).expanduser()
    if config.resume is not None:
        world.together(partial(check_resume, folder, config.resume), only_main=True)
    claim_run_folder(folder, world, resume=config.resume is not None)
    run = world.together(partial(_build, config, folder, world, say))
    assert run is not None
    return run


def check_resume(folder: Path, resume: str) -> None:
    """Refuse to resume from nothing before anything is written: a folder with a line of metrics looks like a run.

    Raises:
        UserError: there is no such checkpoint.
        CheckpointError: it is damaged.
    """
    if resume == "latest":
        if not find_slots(folder):
            raise UserError(f"resume is 'latest', but '{folder}' has no checkpoint: start without --resume")
    elif not (Path(resume) / MANIFEST).is_file():
        check_slot(Path(resume))


def _build(config: RunConfig, folder: Path, world: World, say: Say) -> Run:
    import_torchaudio()
    if config.ddp.static_graph and config.train.accumulation > 1:
        raise UserError(
            f"ddp.static_graph is true and train.accumulation is {config.train.accumulation}: DDP fails on a static "
            "graph whose first micro-batch is not synchronised; set one of them back"
        )
    family = load_family(config.model)
    cache = CodeCache(codes_folder(config.data), family.codec_hash())
    train_samples = load_samples(config, cache, "train", say)
    eval_samples = load_samples(config, cache, "eval", say) if config.evaluation.enabled else []
    plan = BatchPlan(
        num_samples=len(train_samples),
        batch_size=config.train.batch_size,
        accumulation=config.train.accumulation,
        world_size=world.size,
        rank=world.rank,
        seed=config.seed,
        shuffle=config.data.shuffle,
    )
    ready = build_model(config, world, family, say)
    optimizer = build_optimizer(ready.model, config.optim)
    total = config.train.max_steps or plan.windows(config.train.epochs)
    state, best = TrainState(), BestTracker()
    records = Records(folder, world, config.records)
    parts: dict[str, Any] = {
        "model": ModelFiles(ready.model, family.load_model),
        "optimizer": NamedOptimizerState(optimizer, ready.model.named_parameters()),
        "precision": ready.policy,
        "train": state,
        "best": best,
        "rng": RngState(config.seed, world.rank),
    }
    run = Run(
        module=world.wrap(ready.module, config.ddp),
        windows=TrainWindows(_loader(config, family, cache, train_samples, world), plan),
        policy=ready.policy,
        optimizer=optimizer,
        lr=partial(lr_at, total=total, config=config.optim),
        total_steps=total,
        weights=family.stream_weights,
        records=records,
        world=world,
        state=state,
        evaluator=build_evaluator(config, ready, cache, eval_samples, world) if config.evaluation.enabled else None,
        checkpoints=CheckpointManager(folder, config.checkpoint, world, records, parts),
        best=best,
        max_norm=config.optim.max_norm,
        log_every=config.train.log_every,
    )
    return run


def prepare_codes(config: DataConfig, family: Family, device: torch.device) -> str:
    """Encode the clips of both splits that the cache does not have yet, and return a line about it.

    Raises:
        BadClips: clips that cannot be used, each named with its reason.
    """
    import_torchaudio()
    splits = [path for path in (config.train, config.eval) if path is not None]
    samples = [sample for path in splits for sample in read_samples(path, config)]
    codec, encode = family.load_codec(device)
    report = prepare(samples, encode, codec, codes_folder(config), config)
    counts = f"{report.encoded} encoded now, {report.reused} already there, {len(report.bad)} left out"
    return f"codes of {report.clips} clips in {report.folder}: {counts}"


def load_samples(config: RunConfig, cache: CodeCache, split: str, say: Say) -> list[Sample]:
    """Read one split of the data and check that the cache holds the codes of all its clips.

    Raises:
        UserError: the split is not configured, empty or broken, or clips are not prepared.
    """
    path = getattr(config.data, split)
    if not path:
        off = ", or switch evaluation off with --evaluation.enabled false" if split == "eval" else ""
        raise UserError(f"data.{split} is not set: give a folder with metadata.json or a JSONL file{off}")
    samples, left_out = cache.usable(read_samples(path, config.data))
    if left_out:
        say(f"data.{split}: {len(left_out)} samples left out, as `rawloop prepare` was asked to skip their clips")
    if not samples:
        raise UserError(f"data.{split} is '{path}', of which no sample can be used")
    cache.check(samples)
    return samples


def build_model(config: RunConfig, world: World, family: Family, say: Say) -> Prepared:
    """Load the model, add its adapter, cast it and put it on its device. The same seed on all ranks: same weights."""
    if not world.is_main:
        transformers.utils.logging.disable_progress_bar()
    policy = PrecisionPolicy(config.precision, world.device, agree=world.any)
    seed_all(config.seed, 0)
    model = family.load_model()
    notices: list[str] = []
    model = policy.prepare(add_adapter(model, config.adapter, notices))
    for notice in [*notices, f"precision: {policy.name} ({policy.reason})"]:
        say(notice)
    seed_all(config.seed, world.rank)
    return Prepared(family, model, policy, LossModule(model, family.losses))


def build_evaluator(
    config: RunConfig, ready: Prepared, cache: CodeCache, samples: list[Sample], world: World
) -> Evaluator:
    """Build the evaluator over this rank's share of the samples."""
    loader = _loader(config, ready.family, cache, samples, world)
    size = config.evaluation.batch_size
    batches = EvalBatches(loader, len(samples), size, rank=world.rank, world_size=world.size)
    return Evaluator(config.evaluation, ready.module, batches, ready.policy, world, ready.family.stream_weights)


def _loader(config: RunConfig, family: Family, cache: CodeCache, samples: list[Sample], world: World) -> Loader:
    batches = MicroBatches(samples, partial(family.example, codes=cache), family.collate)
    return Loader(batches, config.data.num_workers, pin_memory=world.device.type == "cuda")


def start(run: Run, config: RunConfig, say: Say) -> None:
    """Restore the run if the config asks for it, and make its folder ready. Call it last, on every rank.

    Raises:
        UserError: there is no checkpoint to resume from.
        CheckpointError: the named checkpoint is damaged or does not fit.
    """
    assert run.checkpoints is not None
    if config.resume is not None:
        restored = run.checkpoints.load(config.resume)
        run.records.rewind(restored.step)
        say(f"resumed from {restored.slot} at step {restored.step}")
    run.checkpoints.start(run.state.step)
    run.world.together(partial(_open_records, run, config, run.checkpoints.folder), only_main=True)


def _open_records(run: Run, config: RunConfig, folder: Path) -> None:
    replace_text(folder / "config.yaml", to_yaml(config))
    step = run.state.step
    run.records.event("precision", step=step, reason=run.policy.reason, mode=run.policy.name)
    run.records.event("start", step=step, reason=f"training to step {run.total_steps}", **_environment(run))


def _environment(run: Run) -> dict[str, Any]:
    device = run.world.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    return {"world_size": run.world.size, "device": name, **versions}
