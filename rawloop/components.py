"""The components that a run, an evaluation and an inspection are built from. Each function builds one of them."""

import math
import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from torch.optim import Optimizer

from rawloop import optim
from rawloop.adapters.fingerprint import BaseFingerprint
from rawloop.adapters.lora import add_adapter
from rawloop.adapters.quantize import check_quantization, quantize
from rawloop.audio import import_torchaudio
from rawloop.changes import Contents, contents_of
from rawloop.config import RunConfig
from rawloop.contracts import Batch, Family
from rawloop.costs import rate_of, step_cost
from rawloop.data.batches import Draw, EvalBatches, Loader, MicroBatches
from rawloop.data.codes import CodeCache
from rawloop.data.digests import shared
from rawloop.data.index import SampleIndex
from rawloop.data.limits import Limits
from rawloop.data.splits import data_path, load_samples, no_codes, open_codes
from rawloop.dist import World
from rawloop.errors import UserError, first_few
from rawloop.evaluate import Evaluator
from rawloop.families import config_digest, load_family, reading_of, source_of
from rawloop.families.sample_checks import check_repeatable
from rawloop.family_protocols import PackingFamily
from rawloop.files import sha256_files
from rawloop.losses import LossModule
from rawloop.precision.adopting import check_averaging
from rawloop.precision.policy import PrecisionPolicy
from rawloop.seed import seed_all
from rawloop.settings import DDPConfig
from rawloop.sharding import BlockRuns
from rawloop.throughput import Throughput
from rawloop.weights import Source, load_weights


def build_family(config: RunConfig) -> Family:
    """Return the family of the configured model. Refuse settings that it does not support."""
    import_torchaudio()
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


def check_streams(config: RunConfig, family: Family) -> None:
    """Refuse a family whose stream weights are not those of the config."""
    for stream, weight in config.model.stream_weights.items():
        used = family.stream_weights.get(stream, 0.0)
        if used != weight:
            raise UserError(
                f"model.stream_weights.{stream} is {weight:g}, and the family {type(family).__name__} weighs it "
                f"{used:g} (it has {dict(family.stream_weights)}): a family takes them from its config"
            )


@dataclass
class Data:
    """The samples that a command uses, by key (`data.train`, `data.eval`), and the family that has checked them."""

    family: Family
    cache: CodeCache | None
    samples: dict[str, SampleIndex]
    notices: list[str]

    def contents(self) -> Contents:
        """Digest the samples, the tokenizer and the chat template."""
        return contents_of(self.family, self.cache, self.samples)


def read_data(config: RunConfig, family: Family, *splits: str, say: Callable[[str], None] = lambda line: None) -> Data:
    """Read the samples of some splits, the evaluation first. `say` gets lines about progress.

    Raises UserError for a split that is not configured, is empty or has a wrong sample.
    """
    for split in splits:
        data_path(config.data, split)
    cache = open_codes(config.data, family, say)
    about = checked_with(config, family)
    notices: dict[str, list[str]] = {split: [] for split in splits}
    read = {
        split: load_samples(config.data, family, cache, split, notices[split].append, about, say)
        for split in sorted(splits)
    }
    samples = {f"data.{split}": read[split] for split in splits}
    lines = [line for split in splits for line in notices[split]]
    if len(read) > 1 and (same := shared(read["train"].contents, read["eval"].contents)):
        lines.append(
            f"data.eval: {same} of its {len(read['eval'])} samples are also trained on: for these eval_loss "
            "does not measure unseen data; keep the two sets apart"
        )
    return Data(family, cache, samples, lines)


def checked_with(config: RunConfig, family: Family) -> dict[str, Any]:
    """Return facts on which the family's checks of samples depend. They are the same in every command."""
    own = not type(family).__module__.startswith("rawloop.")
    return {
        "model": asdict(config.model),
        "config": config_digest(config.model),
        "family": f"{type(family).__module__}:{type(family).__qualname__}",
        "reading": reading_of(family),
        "rawloop": sha256_files(Path(__file__).parent.rglob("*.py")),
        "source": source_of(type(family)) if own else None,  # of imported modules, which commands differ in
    }


def build_model(
    config: RunConfig,
    world: World,
    family: Family,
    notices: list[str],
    precision: dict[str, Any] | None = None,
    source: Source | None = None,
) -> tuple[nn.Module, PrecisionPolicy, BaseFingerprint]:
    """Load the model, add its adapter, quantise its base, cast it and move it to its device.

    All ranks get the same weights.

    Args:
        config: the whole configuration.
        world: the ranks.
        family: loads the model.
        notices: lines for the user are appended to it.
        precision: the stored state of the policy, if a checkpoint will be restored.
        source: the checkpoint that the model takes its weights from.
    """
    policy = build_policy(config, world, precision)
    model, base = load_model(config, world, family, notices)
    prepare_model(config, model, policy, base, family, source, notices)
    return model, policy, base


def build_policy(config: RunConfig, world: World, precision: dict[str, Any] | None = None) -> PrecisionPolicy:
    """Build the precision policy; see `build_model`."""
    return PrecisionPolicy(config.precision, world=world, resume=precision, seed=config.seed)


def load_model(
    config: RunConfig, world: World, family: Family, notices: list[str]
) -> tuple[nn.Module, BaseFingerprint]:
    """Load the model on the CPU, and add its adapter; see `build_model`.

    Numbers of safetensors files are mapped, so the processes of a machine share their memory.
    """
    if not world.is_main or not sys.stderr.isatty():  # in a log file the bar would be thousands of blanks
        transformers.utils.logging.disable_progress_bar()
    check_quantization(config.model.quantization)
    seed_all(config.seed, 0)
    model = add_adapter(family.load_model(), config.adapter, notices, config.model.revision)
    first_of_machine = world.local_rank == 0
    path, revision, quantization = config.model.path, config.model.revision, config.model.quantization
    return model, BaseFingerprint(model, path, revision, config.seed, quantization, full=first_of_machine)


def prepare_model(
    config: RunConfig,
    model: nn.Module,
    policy: PrecisionPolicy,
    base: BaseFingerprint,
    family: Family,
    source: Source | None,
    notices: list[str],
    block_runs: BlockRuns | None = None,
) -> None:
    """Give a loaded model the weights of `source`, quantise its base, cast it and move it to its device.

    If it is sharded, with the result `block_runs`, all ranks call this together.
    """
    if source is not None:
        notices += load_weights(source, model, base, family)
    if config.model.quantization:
        notices.append(quantize(model, config.model.quantization, policy.device))
    policy.prepare(model, block_runs)
    seed_all(config.seed, policy.world.rank)


def build_optimizer(config: RunConfig, policy: PrecisionPolicy, world: World) -> Optimizer:
    """Build the optimizer over what the policy trains. Refuse one that does not go with its masters, on all ranks."""

    def build() -> Optimizer:
        optimizer = optim.build_optimizer(policy.named_parameters(), config.optim)
        check_averaging(optimizer, policy.trained)
        return optimizer

    optimizer = world.on_all_ranks(build)
    assert optimizer is not None
    return optimizer


def build_evaluator(
    config: RunConfig,
    data: Data,
    loader: Loader,
    module: LossModule,
    policy: PrecisionPolicy,
    world: World,
    groups: Sequence[Sequence[int]] | None = None,
) -> Evaluator:
    """Build the evaluator over this rank's share of `data.eval`, whose micro-batches the loader makes.

    `groups` are the samples of each micro-batch, instead of `evaluation.batch_size`.
    """
    size, count = config.evaluation.batch_size, len(data.samples["data.eval"])
    batches = EvalBatches(loader, count, size, rank=world.rank, world_size=world.size, groups=groups)
    return Evaluator(
        operator.call,  # a LossModule computes the losses itself
        batches,
        model=module,
        policy=policy,
        world=world,
        weights=data.family.stream_weights,
        every=config.evaluation.every,
        bar=config.records.progress,
    )


def build_loader(config: RunConfig, data: Data, split: str, limits: Limits, world: World) -> Loader:
    """Build the loader of a split's micro-batches. Refuse a family whose batches differ from one time to the next."""
    samples = data.samples[split]
    example = partial(data.family.example, codes=data.cache or no_codes)
    pick = samples.references(config.data, config.seed)
    batches = MicroBatches(samples, example, data.family.collate, limits.fault, config.seed, pick)
    firsts = [Draw(index, epoch=0) for index in range(min(2, len(samples)))]
    check_repeatable(lambda: batches.made(firsts)[1])
    return Loader(batches, config.data.num_workers, pin_memory=world.device.type == "cuda")


def build_throughput(
    config: RunConfig,
    data: Data,
    first: Callable[[], Batch],
    module: LossModule,
    policy: PrecisionPolicy,
    say: Callable[[str], None],
) -> Throughput:
    """Build the measure of speed. MFU needs a card whose rate in the precision mode is known."""
    peak = rate_of(policy.device, policy.name, config.precision.tf32)
    # A sharded model needs all ranks in a pass, and their cards may differ.
    counts = any(policy.world.any([peak is not None])) if policy.block_runs else peak is not None
    cost = step_cost(module, first(), peak or math.nan, policy) if counts else None
    cost = cost if peak else None
    if cost is not None:
        say(f"MFU: {cost}")
    return Throughput(data.cache.codec.frame_rate if data.cache else 1.0, cost)


def decide_find_unused(config: DDPConfig, unused: Sequence[Sequence[str]]) -> tuple[DDPConfig, str | None]:
    """Decide on `find_unused_parameters` from the parameters that the first batch left unused.

    Args:
        config: true, false or auto.
        unused: for each rank the names of the trained parameters that got no gradient.

    Returns:
        the config with true or false, and a notice for the user or None.

    Raises:
        UserError: it is false, and DDP would hang or the ranks' weights would diverge.
    """
    everywhere = [name for name in unused[0] if all(name in names for names in unused)]
    partly = sorted({name for names in unused for name in names} - set(everywhere))
    several = len(unused) > 1
    groups = ((everywhere, " on any rank" if several else ""), (partly, " on some ranks"))
    found = [f"{len(names)} trained weights{where} ({first_few(names)})" for names, where in groups if names]
    if not found:
        return replace(config, find_unused_parameters=config.find_unused_parameters is True), None
    what = f"the first batch gives no gradient to {' and to '.join(found)}"
    if config.find_unused_parameters is False and several:
        raise UserError(
            f"ddp.find_unused_parameters is false, and {what}: DDP would wait for ever, or let the ranks drift apart. "
            "Set it to true or auto, or freeze these weights (adapter.freeze)"
        )
    advice = "weights that no batch uses are never trained: freeze them (adapter.freeze), or check the data"
    return replace(config, find_unused_parameters=True), f"{what}; {advice}"
