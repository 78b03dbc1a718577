"""Plans the micro-batches of a run from its config, and rehearses the costliest one before step 0.

Memory trouble then shows in the first minute, on all ranks together, and not in the hour in which the longest samples
happen to meet.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from rawloop.changes import Contents
from rawloop.components import Data
from rawloop.config import RunConfig
from rawloop.contracts import Batch
from rawloop.data.accept import HEARD_RATE, decode_once
from rawloop.data.batches import BatchPlan, Draw, MicroBatches, Plan
from rawloop.data.buckets import Array, FramePlan
from rawloop.data.config import codes_folder
from rawloop.data.lengths import Lengths, groups_of
from rawloop.data.samples import named
from rawloop.data.splits import no_codes
from rawloop.dist import World
from rawloop.errors import UserError, first_few, first_line, is_out_of_memory
from rawloop.family_protocols import HearingFamily
from rawloop.files import replace_file
from rawloop.losses import LossModule
from rawloop.optim import state_bytes
from rawloop.precision.policy import PrecisionPolicy
from rawloop.precision.preflight import preflight
from rawloop.rebuild import trial_loss
from rawloop.settings import TrainConfig
from rawloop.sharding import is_sharded, part_of
from rawloop.versions import installed_versions

T = TypeVar("T")
GB = 1e9
MANY = 20_000  # samples whose lengths are stored: to measure them takes some seconds


def build_plan(config: RunConfig, data: Data, world: World, contents: Contents) -> Plan:
    """Return the plan of the training set's micro-batches. Measures all samples for `train.max_frames`.

    Raises:
        UserError: a sample is longer than `train.max_frames`, or there are too few samples for a step.
    """
    train, samples = config.train, data.samples["data.train"]
    if train.max_frames:
        return FramePlan(
            _fitting(config, data, contents),
            train.max_frames,
            accumulation=train.accumulation,
            world_size=world.size,
            rank=world.rank,
            seed=config.seed,
            shuffle=config.data.shuffle,
            packed=config.data.packing,
        )
    return BatchPlan(
        num_samples=len(samples),
        batch_size=train.batch_size,
        accumulation=train.accumulation,
        world_size=world.size,
        rank=world.rank,
        seed=config.seed,
        shuffle=config.data.shuffle,
    )


def measurer(config: RunConfig, data: Data, split: str) -> Lengths:
    """Return what measures the samples of a split."""
    samples, family = data.samples[split], data.family
    cache = data.cache
    if cache is None and samples.has_clips:
        rate = family.sample_rate if isinstance(family, HearingFamily) else HEARD_RATE
        cache = decode_once(samples, codes_folder(config.data), rate, config.data)
    batches = MicroBatches(
        samples,
        partial(family.example, codes=data.cache or no_codes),
        family.collate,
        seed=config.seed,
        pick=samples.references(config.data, config.seed),
    )
    return Lengths(family, batches, cache.frames if cache else _no_frames)


def all_lengths(config: RunConfig, data: Data, contents: Contents, split: str) -> Array:
    """Return the positions of all samples of a split, int64.

    Of many samples they are stored beside the codes, by everything that they depend on. A file that is damaged or
    cannot be written is no error: they are measured again.
    """
    number = len(data.samples[split])
    digest = contents.digests[split].together(0, number)
    key = repr((contents.reading, contents.source, digest, installed_versions()))
    file = codes_folder(config.data) / f"lengths-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy"
    if number >= MANY and file.exists():
        with _told(data, f"{file} cannot be used, and the lengths are measured again"):
            found: Array = np.load(file, allow_pickle=False).astype(np.int64)
            if found.shape != (number,):
                raise ValueError(f"it has {found.shape} lengths for {number} samples")
            return found
    lengths = measurer(config, data, split).of(range(number))
    if number >= MANY:
        stream = BytesIO()
        np.save(stream, lengths.astype(np.int32))
        with _told(data, f"{file} cannot be written, and the lengths are measured at each start"):
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(file, stream.getvalue())
    return lengths


@contextmanager
def _told(data: Data, what: str) -> Iterator[None]:
    """Make a notice of an error of the file with lengths."""
    try:
        yield
    except (OSError, ValueError, EOFError) as error:
        data.notices.append(f"{what}: {error}")


def _no_frames(path: Path) -> int:
    raise AssertionError(f"{path} has no length")


def _fitting(config: RunConfig, data: Data, contents: Contents) -> Array:
    """Return the lengths of the training samples. One above `train.max_frames` is refused, or is to be left out."""
    samples, most = data.samples["data.train"], config.train.max_frames
    lengths = all_lengths(config, data, contents, "data.train")
    long = {
        samples[index].id: f"sample '{samples[index].id}' ({samples[index].source}) takes {lengths[index]}"
        for index in np.flatnonzero(lengths > most).tolist()
    }
    if not long:
        return lengths
    what = f"{len(long)} of {len(samples)} samples of data.train take more positions than train.max_frames ({most})"
    if config.data.on_bad_sample == "stop" or len(long) == len(samples):
        raise UserError(
            f"{what}: {named(long)}: set train.max_frames to {lengths.max()} or more, or leave them out: "
            "--data.on_bad_sample skip"
        )
    data.notices.append(f"{what}; they are left out, since data.on_bad_sample is skip: {named(long)}")
    return lengths


def evaluation_groups(config: RunConfig, data: Data, contents: Contents) -> Sequence[Sequence[int]] | None:
    """Return the evaluation samples by micro-batch, if `train.max_frames` decides."""
    if not config.train.max_frames:
        return None
    lengths = all_lengths(config, data, contents, "data.eval")
    return groups_of(lengths, config.train.max_frames, config.data.packing)


def plan_lines(config: RunConfig, plan: Plan) -> Iterator[str]:
    """Yield lines about a plan by positions, and that `train.batch_size` has no effect then."""
    train = config.train
    if isinstance(plan, FramePlan):
        yield plan.text()
        if train.batch_size != TrainConfig.batch_size:
            yield (
                f"train.max_frames is {train.max_frames} and train.batch_size {train.batch_size}: max_frames decides, "
                "batch_size has no effect"
            )


def rehearse(
    config: RunConfig,
    data: Data,
    batches: MicroBatches,
    plan: Plan,
    module: LossModule,
    policy: PrecisionPolicy,
    say: Callable[[str], None],
    fix: Callable[[], str],
) -> None:
    """Run the costliest micro-batch forward and backward, and undo its changes. All ranks call this.

    On a GPU the peak is told. `fix` says what to do if memory does not suffice; see `within_memory`.

    Raises:
        UserError: on all ranks, if the memory of one of them does not suffice.
    """
    world, device = policy.world, policy.device
    on_gpu = device.type == "cuda"
    peaks = []
    if data.samples["data.train"].references(config.data, config.seed):
        batches = measurer(config, data, "data.train").batches
    for chosen in world.on_all_ranks(partial(costliest, config, data, plan)) or []:
        made = world.on_all_ranks(partial(batches.made, chosen))
        assert made is not None
        what = described(made[1])
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        run = partial(_run_once, made[1], module, policy, config)
        within_memory(run, world, f"the costliest micro-batch has {what}", fix, policy.block_runs is not None)
        peaks.append((torch.cuda.max_memory_allocated(device) / GB if on_gpu else 0.0, what))
    if on_gpu:
        most, what = max(world.gather(max(peaks)))
        total = torch.cuda.get_device_properties(device).total_memory / GB
        say(f"rehearsal: the costliest micro-batch ({what}) takes {most:.1f} of {total:.1f} GB at its peak")


def _run_once(batch: Batch, module: LossModule, policy: PrecisionPolicy, config: RunConfig) -> None:
    """Run one pass beside what training holds by then: optimizer state, and gradients of earlier micro-batches."""
    weights = [*policy.trained.weights.values()]
    sizes = [state_bytes(config.optim, name, part_of(weight.detach())) for name, weight in policy.named_parameters()]
    state = [torch.empty(size, dtype=torch.uint8, device=policy.device) for size in sizes]
    accumulates, sharded = config.train.accumulation > 1, any(map(is_sharded, weights))
    # A sharded model adds up whole gradients, until the last backward pass of a step has reduced them.
    shapes = [(weight.shape, weight.dtype) for weight in weights] if sharded and accumulates else []
    whole = [torch.empty(shape, dtype=dtype, device=policy.device) for shape, dtype in shapes]
    keeps_gradients = not sharded and (accumulates or policy.world.size > 1)
    gradients = [torch.empty_like(weight) for weight in policy.trained.weights.values()] if keeps_gradients else []

    def loss() -> Tensor:
        found = trial_loss(module, batch, policy.device)
        gradients.clear()  # backward makes its own
        return found

    preflight(policy, loss)
    del state, whole


def costliest(config: RunConfig, data: Data, plan: Plan) -> list[list[Draw]]:
    """Return the micro-batches to rehearse: with `train.batch_size`, the longest samples, should they ever meet."""
    if isinstance(plan, FramePlan):
        return plan.costliest()
    number = min(config.train.batch_size, len(data.samples["data.train"]))
    return [[Draw(index, epoch=0) for index in measurer(config, data, "data.train").longest(number)]]


def described(batch: Batch) -> str:
    """Return the shapes of a micro-batch's inputs, and its samples."""
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in batch.inputs.items())
    return f"{shapes} of the samples {first_few(batch.ids)}"


def advice(config: RunConfig) -> str:
    """Return the settings that need less memory."""
    train = config.train
    key = "train.max_frames" if train.max_frames else "train.batch_size"
    ways = ["leave out the longest samples (data.max_seconds)", "train less of the model"]
    if not config.model.activation_checkpointing:
        ways.insert(0, "set model.activation_checkpointing")
    if train.max_frames or train.batch_size > 1:
        value = train.max_frames or train.batch_size
        ways.insert(0, f"lower {key} ({value}) and raise train.accumulation by the same factor")
    return f"{', '.join(ways[:-1])}, or {ways[-1]}; `rawloop plan` with the same settings says what each change saves"


def within_memory(work: Callable[[], T], world: World, what: str, fix: Callable[[], str], sharded: bool = False) -> T:
    """Run what all ranks run together, and what raises on all of them if it raises on one.

    `fix` is called on rank 0 if memory does not suffice, and returns what to do. With `sharded`, `work` runs passes of
    a sharded model: a rank raises its error at once, as the others may be inside of a pass, where no agreement reaches
    them.

    Raises:
        UserError: on all ranks, if one of them ran out of memory.
    """
    result, error = None, None
    try:
        result = work()
    except Exception as caught:
        if sharded and is_out_of_memory(caught):
            lacks = f"the memory of rank {world.rank} does not suffice ({first_line(caught)})"
            raise UserError(f"{lacks}: {what}: {fix()}") from caught
        if sharded:
            raise
        error = caught
    full = error is not None and is_out_of_memory(error)
    shares = world.gather(f"({first_line(error)}): {what}" if error is not None and full else None)
    rank = next((rank for rank, share in enumerate(shares) if share is not None), None)
    if rank is not None:
        where = f" of rank {rank}" if world.size > 1 else ""
        way = world.from_main(world.on_all_ranks(fix, only_main=True))
        raise world.raised_on_all(UserError(f"the memory{where} does not suffice {shares[rank]}: {way}")) from error
    if error is not None:
        raise error
    return result  # type: ignore[return-value]
