"""One micro-batch under measurement: head room, flushed shares, exponents, the scales that fit, and lost updates."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from rawloop.config import RunConfig
from rawloop.contracts import Batch
from rawloop.dist import World
from rawloop.errors import TrainingError
from rawloop.kept import Again
from rawloop.precision.advice import share_of_lost_updates
from rawloop.precision.modes import DTYPES
from rawloop.ready import Ready, prepare
from rawloop.watch.look import ModuleHooks
from rawloop.watch.measure import Amounts, Exponents, GradientAmounts, Readings, Window, joined

T = TypeVar("T")
Found = Mapping[tuple[str, str], Amounts]  # by kind and name
LARGEST_FP16 = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Range:
    """The magnitudes of a module's outputs or of their gradients, or of a parameter's gradient."""

    name: str  # of the module or the parameter
    dtype: str  # in which it was computed
    largest: float  # the largest magnitude; that of a gradient is divided by the loss scale
    headroom: float  # bits between it and the limit of its dtype; of a gradient, with the loss scale of the pass
    fp16: float  # bits between it and FP16's limit; of a gradient, under `Probe.scale`
    zeros: float  # the share of zeros
    flushed: float  # the share of the others that FP16 rounds to zero, and
    subnormal: float  # the share of them that it holds with fewer digits


@dataclass(frozen=True)
class Probe:
    """What one micro-batch shows."""

    mode: str
    reason: str  # why the mode was chosen
    ids: tuple[str, ...]
    loss: float
    pass_scale: float  # the loss scale of the measured pass; 1.0 in modes without one
    scale: float  # the loss scale that the shares are for: that of the pass, or the recommended one
    window: Window | None  # the loss scales that fit FP16; None if every gradient is zero
    exponents: Exponents  # of the parameters' gradients, unscaled
    outputs: list[Range]
    output_gradients: list[Range]
    gradients: list[Range]  # by parameter; the others are by module
    lost_updates: dict[str, float]  # the share of weights that an update of size `lr` does not change, by their dtype
    lr: float
    seconds: float  # of the pass, measuring included
    measured_in_fp16: bool  # so the exponents do not show what the pass has flushed


def probe(config: RunConfig, world: World) -> Probe:
    """Measure the first micro-batch of a config, in its precision mode.

    Raises:
        TrainingError: its gradients are finite at no loss scale.
    """
    ready, lr = prepare(quiet(config), world), config.optim.lr
    policy, batch, start = ready.policy, first_batch(ready), time.perf_counter()
    (loss, read), scale, not_finite = at_finite_scale(ready, lambda scale: _measured(ready, batch, scale))
    seconds = time.perf_counter() - start
    if not_finite:
        raise TrainingError(
            f"the gradients of the samples {', '.join(batch.ids)} are not finite in {policy.name} at a loss "
            f"scale of {scale:g}: a probe has nothing to measure; `rawloop doctor` searches for the cause"
        )
    scaled = joined(amounts for (kind, _), amounts in read.items() if kind == "gradient")
    exponents = scaled.shifted(-round(math.log2(scale)))
    window = exponents.window()
    wanted = scale if scale != 1.0 or window is None else window.recommended()
    weights = [weight.detach() for _, weight in policy.named_parameters()]
    return Probe(
        mode=policy.name,
        reason=policy.reason,
        ids=tuple(batch.ids),
        loss=loss,
        pass_scale=scale,
        scale=wanted,
        window=window,
        exponents=exponents,
        outputs=_ranges(read, "forward", 1.0, 1.0),
        output_gradients=_ranges(read, "backward", scale, wanted),
        gradients=_ranges(read, "gradient", scale, wanted),
        lost_updates={n: share_of_lost_updates((w.to(dtype) for w in weights), lr) for n, dtype in DTYPES.items()},
        lr=lr,
        seconds=seconds,
        measured_in_fp16=any(a.dtype is torch.float16 for (kind, _), a in read.items() if kind == "backward"),
    )


def quiet(config: RunConfig) -> RunConfig:
    """Return a config that reads no evaluation data, starts no workers and sends no metrics anywhere."""
    return replace(
        config,
        data=replace(config.data, num_workers=0),
        evaluation=replace(config.evaluation, enabled=False),
        checks=replace(config.checks, enabled=False),
        records=replace(config.records, report_to=[], progress=False),
    )


def first_batch(ready: Ready, window: int = 0) -> Batch:
    """Return the first micro-batch of a window."""
    made: Batch = ready.train.batches.made(ready.plan.micro_batches(window)[0])[1]
    return made


def loss_of(ready: Ready, batch: Batch, scale: float) -> Tensor:
    """Return the loss of a micro-batch that is a whole window, multiplied by the scale."""
    again = Again(ready.module, ready.policy, ready.data.family.stream_weights, batch.targets, 1, scale, batch)
    loss: Tensor = again(again.inputs)
    return loss


def backward(ready: Ready, batch: Batch, scale: float) -> float:
    """Run the forward and backward pass of a micro-batch. Return its loss, unscaled."""
    loss = loss_of(ready, batch, scale)
    torch.autograd.backward(loss)
    return float(loss.detach()) / scale


def gradients_of(ready: Ready) -> dict[str, Tensor]:
    """Return the gradients of the trained weights by name, still multiplied by the loss scale."""
    return {name: weight.grad for name, weight in ready.policy.trained.weights.items() if weight.grad is not None}


def at_finite_scale(ready: Ready, run: Callable[[float], T]) -> tuple[T, float, str]:
    """Run a backward pass at the loss scale of the mode, halved until the gradients are finite.

    Returns:
        The result of the last pass, its scale, and the first gradient that is not finite; empty if all are.
    """
    scaler = ready.policy.scaler
    scale = scaler.scale if scaler else 1.0
    while True:
        made = run(scale)
        bad = next((name for name, g in gradients_of(ready).items() if not bool(g.isfinite().all())), "")
        if not bad or scaler is None or scale <= scaler.config.floor:
            return made, scale, bad
        ready.policy.zero_grad()
        scale /= 2


def _measured(ready: Ready, batch: Batch, scale: float) -> tuple[float, Found]:
    readings = Readings()
    hooks = ModuleHooks(ready.model, readings).install()
    try:
        loss = backward(ready, batch, scale)
    finally:
        hooks.remove()
    for name, gradient in gradients_of(ready).items():
        readings.add_gradient(name, gradient)
    return loss, readings.read()


def _ranges(read: Found, wanted_kind: str, scale: float, wanted: float) -> list[Range]:
    """Return the ranges of a kind, that with the least head room in FP16 first."""
    found = [(name, a) for (kind, name), a in read.items() if kind == wanted_kind and a.finite]
    return sorted((_range(name, amounts, scale, wanted) for name, amounts in found), key=lambda row: row.fp16)


def _range(name: str, amounts: Amounts, scale: float, wanted: float) -> Range:
    largest = amounts.largest / scale
    in_fp16 = amounts.exponents.shifted(round(math.log2(wanted / scale)))
    return Range(
        name,
        str(amounts.dtype).removeprefix("torch."),
        largest,
        amounts.headroom,
        math.log2(LARGEST_FP16 / (largest * wanted)) if largest else math.inf,
        amounts.lost if isinstance(amounts, GradientAmounts) else amounts.zeros,
        in_fp16.flushed(1.0),
        in_fp16.subnormal(1.0),
    )
