"""What a step takes, without computing it: bytes by what they are, and floating-point operations.

It is the real step (family, adapter, precision policy, loop) on fake tensors. Blocks of a kind are equal, so the step
runs on models with few of each kind, from which the counts of the whole model follow.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import SGD

from rawloop.adapters.lora import add_adapter
from rawloop.adapters.quantize import quantize
from rawloop.allocations import Allocations, extrapolated, mark_phases, peak_of, to_fake, use_gpu_dropout
from rawloop.components import build_optimizer
from rawloop.config import RunConfig
from rawloop.contracts import Batch, Family, has
from rawloop.dist import World
from rawloop.errors import UserError
from rawloop.families.loading import can_checkpoint, enable_activation_checkpointing
from rawloop.layers import block_kinds, remove_blocks
from rawloop.loop import Run, accumulate, update
from rawloop.losses import LossModule
from rawloop.optim import KINDS
from rawloop.precision.policy import PrecisionPolicy
from rawloop.precision.preflight import is_lacking
from rawloop.rounding import CHUNK
from rawloop.sharding import find_blocks

FEW = 2  # blocks; the first and the last may differ in what they keep
# Bytes of state for each float32 number, of the optimizers of libraries, which cannot be run on fake tensors. Pages of
# paged_adamw_8bit may leave the device, and count as those of adamw_8bit, which stay.
STATES = MappingProxyType(
    {name: 4 * (kind.copies or KINDS[kind.nearest].copies) for name, kind in KINDS.items() if kind.package}
)
BUCKETS = "DDP buckets"
GATHERED = "gathered"  # whole weights of the blocks that run, under FSDP
EXTRA = (BUCKETS, GATHERED)
SHARDED = ("frozen weights", "trained weights", "masters", "optimizer", "gradients")
BLOCK = re.compile(r"(^|[.*])\d|[\[?]")  # in a pattern that may name single blocks


@dataclass(frozen=True)
class Estimate:
    """What a step takes on one device.

    Args:
        parameters: of the model, with its adapter.
        trained: how many of them are trained.
        peak: bytes by kind at the peak of the step.
        host: bytes of the copy in host memory for asynchronous saves.
        flops: floating-point operations of one micro-batch, forward and backward, with what is recomputed.
    """

    parameters: int
    trained: int
    peak: dict[str, int]
    host: int
    flops: int

    @property
    def total(self) -> int:
        """The bytes of the peak."""
        return sum(self.peak.values())


def skeleton_of(config: RunConfig, family: Family) -> nn.Module:
    """Return the model on the meta device, made from its config.json. Your own family loads its weights for that."""
    if ":" in config.model.family:
        return family.load_model().to("meta")
    with torch.device("meta"):
        return family.load_model()


def estimate(config: RunConfig, family: Family, skeleton: nn.Module, batch: Batch, processes: int = 1) -> Estimate:
    """Count a step of the configured run.

    Args:
        config: `device: cpu` counts as on a CPU, all others as on a GPU. The mode auto counts as bf16.
        family: of the model.
        skeleton: its model without activation checkpointing, on the meta device; stays as it is.
        batch: the micro-batch.
        processes: of the run.

    Raises:
        UserError: the settings contradict each other or the model.
    """
    patterns = [*config.adapter.target_modules, *config.adapter.freeze, *config.adapter.unfreeze]
    named = any(BLOCK.search(pattern) for pattern in [*patterns, *config.adapter.modules_to_save])
    kinds = [] if named else [kind for kind in block_kinds(skeleton) if len(kind.places) > FEW + 1]
    few, numbers = [FEW] * len(kinds), [len(kind.places) for kind in kinds]
    alone = {id(block) for block in find_blocks(skeleton)}
    names = [name for name, part in skeleton.named_modules() if id(part) in alone]

    def counts(left: list[int]) -> Counter[str]:
        removed: dict[str, list[int]] = {}
        for kind, number in zip(kinds, left, strict=True):
            removed.setdefault(kind.blocks, []).extend(kind.places[number:])
        try:
            return _count(config, family, skeleton, batch, processes, removed, names)
        except Exception as error:
            if not is_lacking(error):
                raise
            why = str(error).splitlines()[0]
            raise UserError(f"{type(skeleton).__name__} cannot run in {config.precision.mode}: {why}") from error

    longer = [counts([FEW + (place == at) for place in range(len(kinds))]) for at in range(len(kinds))]
    found = extrapolated(counts(few), longer, [number - FEW for number in numbers])
    peak = dict.fromkeys(EXTRA, 0) | peak_of(found)
    if config.parallel == "fsdp" and processes > 1:
        peak |= {GATHERED: 0} | peak_of(_sharded(found, processes, config.train.accumulation > 1))
    else:
        peak[BUCKETS] = found["buckets"]
    return Estimate(found["parameters"], found["trained"], peak, found["host"], found["flops"])


def _sharded(found: Counter[str], processes: int, keeps: bool) -> Counter[str]:
    """Return the counts of one of several processes that share a model by FSDP.

    In a pass the weights of a block and of the next one are whole, and all weights outside of the blocks that FSDP
    gathers alone. In the backward pass so are their gradients, and a copy of those that are reduced: of a block, and at
    the end of all outside.

    Args:
        found: the counts of the whole model.
        processes: their number.
        keeps: gradients stay whole between micro-batches.
    """
    shared = {kind for kind in SHARDED if kind != "gradients" or not keeps}
    counts = Counter({n: size // processes if n.partition("|")[2] in shared else size for n, size in found.items()})
    block_gradients, outside_gradients = found["block gradients"], found["outside gradients"]
    weights, copies = found["outside weights"] + 2 * found["block weights"], 1 if keeps else 2
    phases = {name.partition("|")[0] for name in found if "|" in name} - {"update"}
    for phase in phases:
        is_last = phase.endswith("first") or len(phases) == 1  # of the backward pass
        gradients = (copies if is_last else copies - 1) * outside_gradients  # the head's come first
        gradients += copies * block_gradients * (is_last or phase != "forward")
        counts[f"{phase}|{GATHERED}"] = weights + gradients
    return counts


def _count(
    config: RunConfig,
    family: Family,
    skeleton: nn.Module,
    batch: Batch,
    processes: int,
    removed: Mapping[str, Collection[int]],
    alone: Collection[str] = (),
) -> Counter[str]:
    """Count a step of the model without some blocks.

    Args:
        config: of the run, as are `family`, the skeleton of its model, `batch` and `processes`; see `estimate`.
        removed: the blocks to leave out: the name of their list, and their places in it.
        alone: the names of the blocks that FSDP gathers alone.
    """
    model = deepcopy(skeleton).train()
    parts = [model.get_submodule(name) for name in alone]
    blocks = [cast(nn.ModuleList, model.get_submodule(name)) for name in removed]
    remove_blocks(model, removed)
    if config.model.activation_checkpointing:
        if not can_checkpoint(model):
            raise UserError(f"{type(model).__name__} has no activation checkpointing")
        enable_activation_checkpointing(model)
    with torch.device("meta"):
        model = add_adapter(model, config.adapter, [], config.model.revision)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    to_fake(model, fake)
    counter = Allocations(_vocabularies(family))
    if config.device != "cpu":
        use_gpu_dropout(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    with fake, counter:
        if config.model.quantization:
            quantize(model, config.model.quantization, torch.device("cpu"))
        run = _run(config, family, model)
        keeps = config.train.accumulation > 1 or (processes > 1 and config.parallel == "ddp")
        weights, states = _hold(run, counter, config.optim.name, keeps)
        mark_phases(model, counter, blocks)
        counter.flops = 0
        counter.peaks.clear()
        counter.start("forward")
        accumulate(run, [batch], batch.targets)
        counter.start("update")
        update(run, [batch])
    found = Counter({f"{phase}|{kind}": size for phase, kinds in counter.peaks.items() for kind, size in kinds.items()})
    trained = [p for p in weights if p.requires_grad]
    saved = weights if config.adapter.mode == "full" else trained
    found["host"] = (_bytes(saved) + _bytes(states)) * config.checkpoint.asynchronous
    found["buckets"] = _bytes(trained) * (processes > 1 and not config.ddp.gradient_as_bucket_view)
    found["parameters"], found["trained"] = parameters, sum(p.numel() for p in trained)
    found["flops"] = counter.flops
    found.update(_gathered(model, parts))
    return found


def _gathered(model: nn.Module, alone: Iterable[nn.Module]) -> Counter[str]:
    """Return the bytes of weights and gradients of the largest block that FSDP gathers alone, and outside of these."""
    left, found = set(model.modules()), Counter[str]()
    blocks = [part for part in alone if part in left]
    for what, frozen in (("weights", True), ("gradients", False)):
        whole, *sizes = (
            _bytes(weight for weight in part.parameters() if frozen or weight.requires_grad)
            for part in (model, *blocks)
        )
        found[f"block {what}"], found[f"outside {what}"] = max(sizes, default=0), whole - sum(sizes)
    return found


def _run(config: RunConfig, family: Family, model: nn.Module) -> Run:
    """Return what the loop needs for a step, on a model of fake tensors."""
    cast(Any, model).to = lambda *_: model  # fake weights cannot be moved, and are on the CPU already
    mode = "bf16" if config.precision.mode == "auto" else config.precision.mode
    world = World(alone=True)  # a rank may want to know why its memory does not suffice
    policy = PrecisionPolicy(replace(config.precision, mode=mode), world=world)
    module = LossModule(policy.prepare(model), family.losses)
    policy.scaler = None  # a loss scale takes no memory
    of_library = config.optim.name in STATES
    held = [parameter for _, parameter in policy.named_parameters()]
    optimizer = SGD(held, config.optim.lr) if of_library else build_optimizer(config, policy, world)
    policy.adopt(optimizer)
    if policy.trained.rounding and config.device != "cpu":
        policy.trained.rounding.chunk = CHUNK
    return Run(
        module=module,
        windows=lambda _: [],
        policy=policy,
        optimizer=optimizer,
        lr=lambda _: config.optim.lr,
        total_steps=1,
        weights=family.stream_weights,
        records=cast(Any, None),  # of steps that are skipped
        world=world,
        max_norm=config.optim.max_norm,
    )


def _hold(run: Run, counter: Allocations, name: str, keeps: bool) -> tuple[list[nn.Parameter], list[torch.Tensor]]:
    """Make what training holds before a step: state of the optimizer `name`, and gradients if it `keeps` them.

    Returns:
        the model's weights; the state of the optimizer and the masters.
    """
    model, policy = run.policy.model, run.policy
    assert model is not None
    weights, masters = list(model.parameters()), list(policy.trained.masters.values())
    for _, held in policy.named_parameters():
        held.grad = torch.empty_like(held)
    policy.stepping = True  # `policy.step` would want gradients of its own backward pass
    run.optimizer.step()
    policy.stepping = False
    policy.trained.clear_gradients()
    states = [value for state in run.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    for _, held in policy.named_parameters():
        states.append(torch.empty(round(held.numel() * STATES.get(name, 0.0)), dtype=torch.uint8))
    counter.hold((*model.buffers(), *(p for p in weights if not p.requires_grad)), "frozen weights")
    counter.hold((p for p in weights if p.requires_grad), "trained weights")
    counter.hold(masters, "masters")
    counter.hold(states, "optimizer")
    for weight in policy.trained.weights.values() if keeps else ():
        weight.grad = torch.empty_like(weight)
        counter.hold([weight.grad], "gradients")
    return weights, [*states, *masters]


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _vocabularies(family: Family) -> set[int]:
    """Return the sizes of the vocabularies that a family's streams guess from."""
    return {round(math.exp(nats)) for nats in family.chance().values()} if has(family, "chance") else set()
