"""One micro-batch under measurement: head room, flushed shares, exponents, the scales that fit, and lost updates."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rawloop.build import Ready, prepare
from rawloop.config import RunConfig
from rawloop.contracts import Batch
from rawloop.dist import World
from rawloop.errors import TrainingError
from rawloop.kept import Again
from rawloop.precision.advice import share_of_lost_updates
from rawloop.precision.modes import DTYPES
from rawloop.watch.look import ModuleHooks
from rawloop.watch.measure import Amounts, Exponents, GradientAmounts, Readings, Window, joined

FP16 = torch.float16


@dataclass(frozen=True)
class Range:
    """The magnitudes of a module's outputs and of their gradients, or of a parameter's gradient.

    Args:
        name: of the module or the parameter.
        dtype: in which it was computed.
        largest: the largest magnitude; that of a gradient is divided by the loss scale.
        headroom: the bits between it and the limit of its dtype; of a gradient, with the loss scale of the pass.
        fp16: the bits between it and FP16's limit; of a gradient, under `Probe.scale`.
        zeros: the share of zeros.
        flushed: the share of the others that FP16 rounds to zero under `Probe.scale`.
        subnormal: the share of the others that is subnormal in FP16 under `Probe.scale`.
    """

    name: str
    dtype: str
    largest: float
    headroom: float
    fp16: float
    zeros: float
    flushed: float
    subnormal: float


@dataclass(frozen=True)
class Probe:
    """What one micro-batch shows.

    Args:
        mode: the precision mode, and why it was chosen.
        ids: the samples.
        loss: their loss.
        pass_scale: the loss scale of the measured pass, 1.0 in modes without one.
        scale: the loss scale that the shares are for: that of the pass, or the recommended one.
        window: the loss scales that fit FP16; None if every gradient is zero.
        exponents: of the parameters' gradients, unscaled.
        outputs, output_gradients: by module.
        gradients: by parameter.
        lost_updates: the share of weights that an update of size `lr` does not change, by the dtype of the weights.
        lr: the learning rate.
        seconds: of the pass, measuring included.
    """

    mode: str
    reason: str
    ids: tuple[str, ...]
    loss: float
    pass_scale: float
    scale: float
    window: Window | None
    exponents: Exponents
    outputs: list[Range]
    output_gradients: list[Range]
    gradients: list[Range]
    lost_updates: dict[str, float]
    lr: float
    seconds: float

    @property
    def is_blind(self) -> bool:
        """Whether the pass was in FP16, which has flushed what is missing at the lower end of the exponents."""
        return any(row.dtype == "float16" for row in self.output_gradients)


def probe(config: RunConfig, world: World) -> Probe:
    """Measure the first micro-batch of a config, in its precision mode."""
    ready = prepare(quiet(config), world)
    start = time.perf_counter()
    loss, scale, read = _measured_pass(ready)
    seconds = time.perf_counter() - start
    bits = round(math.log2(scale))
    true = joined(a for (kind, _), a in read.items() if kind == "gradient").shifted(-bits)
    window = true.window()
    wanted = scale if scale != 1.0 or window is None else window.recommended()
    weights = [weight.detach() for _, weight in ready.policy.named_parameters()]
    lost = {
        name: share_of_lost_updates((weight.to(dtype) for weight in weights), config.optim.lr)
        for name, dtype in DTYPES.items()
    }
    return Probe(
        ready.policy.name,
        ready.policy.reason,
        tuple(first_batch(ready).ids),
        loss,
        scale,
        wanted,
        window,
        true,
        _ranges(read, "forward", 1.0, 1.0),
        _ranges(read, "backward", scale, wanted),
        _ranges(read, "gradient", scale, wanted),
        lost,
        config.optim.lr,
        seconds,
    )


def quiet(config: RunConfig) -> RunConfig:
    """Return a config that reads no evaluation data, starts no workers and sends no metrics anywhere."""
    return replace(
        config,
        data=replace(config.data, num_workers=0),
        evaluation=replace(config.evaluation, enabled=False),
        checks=replace(config.checks, enabled=False),
        records=replace(config.records, tensorboard=False, wandb=False, progress=False),
    )


def first_batch(ready: Ready, window: int = 0) -> Batch:
    """Return the first micro-batch of a window."""
    made: Batch = ready.train.batches.made(ready.plan.micro_batches(window)[0])[1]
    return made


def pass_of(ready: Ready, batch: Batch, scale: float) -> Again:
    """Return the forward pass of a micro-batch that is a whole window."""
    return Again(ready.module, ready.policy, ready.data.family.stream_weights, batch.targets, 1, scale, batch)


def backward(ready: Ready, batch: Batch, scale: float) -> Tensor:
    """Run the forward and backward pass of a micro-batch. Return its loss, unscaled."""
    again = pass_of(ready, batch, scale)
    root = again(again.inputs)
    torch.autograd.backward(root)
    return root.detach() / scale


def gradients_of(ready: Ready) -> dict[str, Tensor]:
    """Return the gradients of the trained weights by name, still multiplied by the loss scale."""
    return {name: weight.grad for name, weight in ready.policy.trained.weights.items() if weight.grad is not None}


def _measured_pass(ready: Ready) -> tuple[float, float, Mapping[tuple[str, str], Amounts]]:
    """Return the loss, its scale and all amounts. The scale is halved until the gradients are finite."""
    batch = first_batch(ready)
    scaler = ready.policy.scaler
    scale = scaler.scale if scaler else 1.0
    while True:
        readings = Readings()
        hooks = ModuleHooks(ready.model, readings).install()
        try:
            loss = float(backward(ready, batch, scale))
            for name, gradient in gradients_of(ready).items():
                readings.add_gradient(name, gradient)
        finally:
            hooks.remove()
        read = readings.read()
        if all(amounts.finite for (kind, _), amounts in read.items() if kind == "gradient"):
            return loss, scale, read
        ready.policy.zero_grad()
        if scaler is None or scale <= scaler.config.floor:
            raise TrainingError(
                f"the gradients of the samples {', '.join(batch.ids)} are not finite in {ready.policy.name} at a loss "
                f"scale of {scale:g}: a probe has nothing to measure; `rawloop doctor` searches for the cause"
            )
        scale /= 2


def _ranges(read: Mapping[tuple[str, str], Amounts], kind: str, scale: float, wanted: float) -> list[Range]:
    rows = []
    for (found, name), amounts in read.items():
        if found == kind and amounts.finite:
            rows.append(_range(name, amounts, scale, wanted))
    return sorted(rows, key=lambda row: row.fp16)


def _range(name: str, amounts: Amounts, scale: float, wanted: float) -> Range:
    largest = amounts.largest / scale
    in_fp16 = amounts.exponents.shifted(round(math.log2(wanted / scale)))
    return Range(
        name,
        str(amounts.dtype).removeprefix("torch."),
        largest,
        amounts.headroom,
        math.log2(torch.finfo(FP16).max / (largest * wanted)) if largest else math.inf,
        amounts.lost if isinstance(amounts, GradientAmounts) else amounts.zeros,
        in_fp16.flushed(1.0),
        in_fp16.subnormal(1.0),
    )
