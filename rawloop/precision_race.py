"""Every precision mode that a device can run, on the same batches: errors against a reference, then a short race."""

import gc
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rawloop.config import RunConfig
from rawloop.contracts import Batch
from rawloop.dist import World
from rawloop.errors import RawloopError, TrainingError, UserError, first_line, is_out_of_memory
from rawloop.optim import build_optimizer, check_optimizer, lr_at, set_lr, use_trained
from rawloop.precision.advice import share_of_lost_updates
from rawloop.precision.config import SCALED, LossScaleConfig
from rawloop.precision.modes import MODES
from rawloop.precision.preflight import is_lacking
from rawloop.precision_probe import at_finite_scale, backward, first_batch, gradients_of, loss_of, quiet
from rawloop.ready import Ready
from rawloop.ready import prepare as build_ready
from rawloop.seed import seed_all

BATCHES = 2  # micro-batches whose gradients are compared
SMALL = 1e-4  # modules with a smaller share of the gradient's norm are no worst module
NEAR = 0.1  # modes whose steps differ by less are as fast as each other
MOST_SLOWER = 0.01  # of the reference's loss: how much higher a mode may end in the race
LEAST_COSINE = 0.99


@dataclass(frozen=True)
class Errors:
    """The gradients of a mode against those of the reference."""

    relative: float  # the L2 norm of the difference over that of the reference
    cosine: float
    zeros: float  # the share of values that are zero, and not in the reference
    flips: float  # the share of values with another sign


@dataclass
class Race:
    """The losses of some updates, from the weights that the config starts from."""

    losses: list[float] = field(default_factory=list)
    skipped: int = 0  # updates that were not applied
    seconds: float = math.nan  # the median time of a step
    ended: str = ""  # why it ended early

    @property
    def final(self) -> float:
        """The mean loss of the last quarter; nan without one."""
        last = self.losses[-max(len(self.losses) // 4, 1) :]
        return statistics.fmean(last) if last and not self.ended else math.nan


@dataclass
class ModeResult:
    """What one mode has shown. If it cannot run, `why_not` says why, and nothing else is set."""

    mode: str
    why_not: str = ""
    loss: float = math.nan
    loss_error: float = math.nan
    errors: Errors | None = None
    modules: dict[str, Errors] = field(default_factory=dict)
    worst: str = ""
    scale: float = 1.0
    overflows: int = 0
    lost_updates: float = 0.0
    seconds: float = math.nan
    race: Race | None = None


@dataclass
class Comparison:
    """All modes against a reference. `recommended` is empty if no mode can be recommended; `reasons` says why."""

    reference: str
    steps: int
    ids: tuple[str, ...]
    lr: float
    results: list[ModeResult]
    recommended: str
    reasons: list[str]


def compare(config: RunConfig, world: World, reference: str = "fp32", steps: int = 20) -> Comparison:
    """Run a few micro-batches, and a race of some steps, in each precision mode.

    Raises:
        UserError: the device or the model cannot run the reference.
    """
    config = quiet(config)
    config.adapter = replace(config.adapter, dropout=0.0)
    truth, loss, ids = _reference(in_mode(config, "fp32"), world, reference)
    results = [_result(in_mode(config, mode), world, truth, loss, steps) for mode in MODES]
    return Comparison(reference, steps, ids, config.optim.lr, results, *recommend(results))


def in_mode(config: RunConfig, mode: str) -> RunConfig:
    """Return a config with another precision mode and no fallback. The mode of the config keeps its own settings."""
    own = config.precision
    if own.mode == mode:
        return replace(config, precision=replace(own, fallback=[]))
    scale = own.loss_scale if mode in SCALED else LossScaleConfig()
    other = replace(own, mode=mode, fallback=[], trainable_dtype="auto", masters="fp32", loss_scale=scale)  # type: ignore[arg-type]
    return replace(config, precision=other)


def _reference(config: RunConfig, world: World, name: str) -> tuple[dict[str, Tensor], float, tuple[str, ...]]:
    """Return the gradients and the loss that all modes are compared with, and the samples."""
    ready = build_ready(config, world)
    ready.module.eval()
    batches = _batches(ready)
    try:
        if name == "fp64":
            ready.module.double()
            for batch in batches:
                batch.inputs = {n: t.double() if t.is_floating_point() else t for n, t in batch.inputs.items()}
        losses, _, not_finite = at_finite_scale(ready, lambda scale: [backward(ready, b, scale) for b in batches])
    except (RuntimeError, TypeError) as error:
        if name == "fp64" and (is_lacking(error) or world.device.type == "mps"):
            raise UserError(f"the model does not compute in float64 ({error}): use --reference fp32") from error
        raise
    found = {key: value.detach().cpu() for key, value in gradients_of(ready).items()}
    if not found or not_finite:
        raise TrainingError(f"the gradients are not finite in {name}: `rawloop doctor` searches for the cause")
    return found, statistics.fmean(losses), tuple(key for batch in batches for key in batch.ids)


def _batches(ready: Ready) -> list[Batch]:
    windows = max(1, min(BATCHES, ready.plan.windows(1)))
    return [first_batch(ready, window) for window in range(windows)]


def _result(config: RunConfig, world: World, truth: Mapping[str, Tensor], loss: float, steps: int) -> ModeResult:
    try:
        return _measure(config, world, truth, loss, steps)
    except RawloopError as error:
        why_not = str(error)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        why_not = f"it does not fit into memory: {first_line(error)}"
    finally:
        gc.collect()
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
    return ModeResult(config.precision.mode, why_not)


def _measure(config: RunConfig, world: World, truth: Mapping[str, Tensor], loss: float, steps: int) -> ModeResult:
    """Measure the gradients of the batches, at a loss scale that is halved until they are finite, then race."""
    result, ready = ModeResult(config.precision.mode), build_ready(config, world)
    policy, batches = ready.policy, _batches(ready)
    ready.module.eval()

    def passes(scale: float) -> tuple[float, float]:
        start = time.perf_counter()
        losses = [backward(ready, batch, scale) for batch in batches]
        return statistics.fmean(losses), (time.perf_counter() - start) / len(batches)

    (result.loss, result.seconds), result.scale, not_finite = at_finite_scale(ready, passes)
    result.overflows = round(math.log2(policy.scaler.scale / result.scale)) if policy.scaler else 0
    result.loss_error = abs(result.loss - loss) / max(abs(loss), 1e-12)
    result.worst = not_finite
    if not not_finite:
        found = {name: g.cpu().to(truth[name].dtype) / result.scale for name, g in gradients_of(ready).items()}
        _judge(result, found, truth)
    policy.zero_grad()
    held = [weight.detach() for _, weight in policy.named_parameters() if not policy.trained.rounding]
    result.lost_updates = share_of_lost_updates(held, config.optim.lr)
    result.race = race(ready, config, steps) if steps else None
    return result


def _judge(result: ModeResult, found: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> None:
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(7, dtype=torch.float64))
    for name in found:
        sums[name.rpartition(".")[0]] += _sums(found[name], truth[name])
    total = torch.stack([*sums.values()]).sum(0)
    result.errors = _errors(total)
    result.modules = {name: _errors(each) for name, each in sums.items()}
    large = [name for name, each in sums.items() if each[1] > SMALL**2 * total[1]]
    if result.errors.relative:  # it is zero for the reference itself
        result.worst = max(large, key=lambda name: result.modules[name].relative, default="")


def _sums(one: Tensor, other: Tensor) -> Tensor:
    """Return sums of squares (difference, reference, mode), the product, and counts of zeros, flips and values."""
    a, b = one.double(), other.double()
    there = b != 0
    zeros, flips = ((a == 0) & there).sum(), (a * b < 0).sum()
    sums = [(a - b).square().sum(), b.square().sum(), a.square().sum(), (a * b).sum(), zeros, flips, there.sum()]
    return torch.stack([each.double() for each in sums])


def _errors(sums: Tensor) -> Errors:
    difference, truth, own, product, zeros, flips, count = sums.tolist()
    relative = math.sqrt(difference / truth) if truth else (math.inf if difference else 0.0)
    size = math.sqrt(truth * own)
    return Errors(relative, product / size if size else 0.0, zeros / max(count, 1), flips / max(count, 1))


def race(ready: Ready, config: RunConfig, steps: int) -> Race:
    """Train some steps of one micro-batch each, from the weights as they are."""
    policy, made, seconds = ready.policy, Race(), []
    check_optimizer(config.optim, policy.device)
    optimizer = build_optimizer(policy.named_parameters(), config.optim)
    policy.adopt(optimizer)
    ready.module.train()
    seed_all(config.seed, 0)
    plan = replace(config.optim, warmup_steps=min(config.optim.warmup(steps), steps // 4), warmup_ratio=0.0)
    for step in range(steps):
        batch = first_batch(ready, step)
        start = time.perf_counter()
        use_trained(optimizer)
        set_lr(optimizer, lr_at(step, steps, plan))
        loss = loss_of(ready, batch, 1.0)
        policy.backward(loss)
        try:
            made.skipped += not policy.step(optimizer, max_norm=config.optim.max_norm).applied
        except TrainingError as error:
            made.ended = f"step {step}: {error}"
            break
        made.losses.append(float(loss.detach()))
        seconds.append(time.perf_counter() - start)
    made.seconds = statistics.median(seconds[1:] or seconds or [math.nan])
    return made


def recommend(results: Sequence[ModeResult]) -> tuple[str, list[str]]:
    """Return the recommended mode, and what speaks for or against each; the mode is empty if none is good.

    Of the modes whose gradients and race are good, it is the fastest. Among equally fast ones it is the one of the
    larger range: fp32, bf16, amp_fp16, native_fp16.
    """
    ran = [result for result in results if not result.why_not]
    truth = next((result for result in ran if result.mode == "fp32"), None)
    wrong = {result.mode: _objection(result, truth) for result in ran}
    reasons = [f"{result.mode}: {wrong[result.mode] or _numbers(result, truth)}" for result in ran]
    good = [result for result in ran if not wrong[result.mode]]
    if not good:
        return "", reasons
    fastest = min(pace(result) for result in good)
    return next(result.mode for result in good if pace(result) <= fastest * (1 + NEAR)), reasons


def pace(result: ModeResult) -> float:
    """Return the seconds of a step, or of a pass without a race."""
    return result.race.seconds if result.race else result.seconds


def _objection(result: ModeResult, truth: ModeResult | None) -> str:
    """Return why a mode that runs cannot be recommended; empty if it can."""
    own, race, true = result.errors, result.race, truth.race if truth else None
    if own is None:
        return f"its gradients are not finite at a loss scale of {result.scale:g}, first in {result.worst}"
    if own.cosine < LEAST_COSINE:
        return f"its gradient points elsewhere (cosine {own.cosine:.4f}, worst module {result.worst})"
    if race and race.ended:
        return f"its race ended: {race.ended}"
    if race and race.skipped > len(race.losses) / 4:
        return f"{race.skipped} of {len(race.losses)} updates of its race were skipped"
    if race and true and not race.final <= true.final + MOST_SLOWER * abs(true.final):  # so that nan fails too
        return f"its race ends at a loss of {race.final:.4g}, that of {truth.mode if truth else ''} at {true.final:.4g}"
    return ""


def _numbers(result: ModeResult, truth: ModeResult | None) -> str:
    """Return the numbers that speak for a mode."""
    assert result.errors is not None
    words = [f"gradient error {result.errors.relative:.1e}{f', worst {result.worst}' if result.worst else ''}"]
    if truth and truth is not result:
        words.append(f"{pace(truth) / pace(result):.2f} times as fast as {truth.mode}")
    if result.race:
        words.append(f"race ends at a loss of {result.race.final:.4g}")
    return ", ".join(words)
