"""The training loop. It receives finished objects and constructs nothing.

One step: take the window's micro-batches, agree with the other ranks on their target counts, forward and backward,
clip and update, advance, log; then evaluate, save, stop. The loop visits step N once more after the last update, so
evaluating and saving have one call site each.
"""

import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rawloop.buffers import MovingBuffers
from rawloop.checkpoint import BestRecord, BestTracker, CheckpointManager
from rawloop.contracts import Batch, StreamLoss
from rawloop.ddp import no_sync, unwrap_ddp
from rawloop.dist import World
from rawloop.errors import InterruptedUpdate, Preempted, RawloopError, TrainingError, UserError, happening, nearest
from rawloop.evaluate import Evaluation, Evaluator
from rawloop.losses import weighted_mean
from rawloop.meter import Meter
from rawloop.optim import set_lr
from rawloop.precision import PrecisionPolicy, StepResult
from rawloop.precision.preflight import preflight
from rawloop.preempt import Preemption, agreed
from rawloop.records import Records
from rawloop.settings import TrainConfig as TrainConfig


@dataclass
class TrainState:
    """Where the run stands. `step` counts applied updates, `window` the windows of data taken, `skipped` the rest.

    `visited` is the last step whose evaluation is done, if one was due. It is behind `step` in the checkpoint of a run
    that was stopped while it evaluated: then the resumed run begins with that evaluation.
    """

    step: int = 0
    window: int = 0
    skipped: int = 0
    samples: int = 0
    visited: int = -1

    def state_dict(self) -> dict[str, Any]:
        """Return the counters."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the counters."""
        self.step, self.window = state["step"], state["window"]
        self.skipped, self.samples = state["skipped"], state["samples"]
        self.visited = state["visited"]


class Windows(Protocol):
    """The training data: an endless stream of windows, from any window on, over `num_samples` samples."""

    num_samples: int

    def start(self, window: int) -> Iterator[list[Batch]]:
        """Yield this rank's windows (lists of micro-batches on the CPU), beginning with number `window`."""
        ...


@dataclass
class Run:
    """Everything that a run is made of, finished and ready. What is None by default may be absent.

    `module` is what is called: a `LossModule`, in DDP or not. `lr(step)` is the learning rate of the update that leads
    from `step` to `step + 1`. `weights` has each stream's weight in the loss. `wrap` makes `module` anew, in DDP or
    not, when the precision policy has fallen back.
    """

    module: nn.Module
    windows: Windows
    policy: PrecisionPolicy
    optimizer: Optimizer
    lr: Callable[[int], float]
    total_steps: int
    weights: Mapping[str, float]
    records: Records
    world: World = field(default_factory=World)
    state: TrainState = field(default_factory=TrainState)
    meter: Meter = field(default_factory=Meter)
    buffers: MovingBuffers | None = None
    evaluator: Evaluator | None = None
    checkpoints: CheckpointManager | None = None
    best: BestTracker | None = None
    preemption: Preemption | None = None
    max_norm: float = 1.0
    log_every: int = 10
    wrap: Callable[[], nn.Module] | None = None
    trouble: RawloopError | None = None  # a record that could not be written, until the ranks agree to stop

    def close(self) -> None:
        """Wait for a save that is under way, let others train into the folder, and close the records."""
        if self.checkpoints:
            self.checkpoints.close()
        self.records.close()


def train(run: Run) -> TrainState:
    """Train until `total_steps` updates are applied; resume from wherever `run.state` stands.

    Raises:
        TrainingError: training cannot go on correctly.
        Preempted: `run.preemption` wants a stop on any rank; where the run stands is on the disk.
        RawloopError: any rank's error, on all ranks.
    """
    state = run.state
    windows = begun(run)
    run.meter.restart_clock(state.samples)
    stopped = stop_early(run)  # it may have been before this resume
    run.module.train()
    with run.records.progress(run.total_steps, state.step) as progress:
        while True:
            last = state.step >= run.total_steps or stopped
            if state.step != state.visited:
                last = evaluate_and_save(run, last)
                run.meter.restart_clock(state.samples)
            if last:
                finish(run)
                return state

            window, targets = take_window(windows, run)
            set_lr(run.optimizer, run.lr(state.step))
            accumulate(run, window, targets)
            result = update(run)

            if run.checkpoints:
                note(run, run.checkpoints.poll)
            state.window += 1
            if result.applied:
                advance(run, result, window, progress)
            else:
                skip(run, result, window)


def begun(run: Run) -> Iterator[list[Batch]]:
    """The windows from the next one on. Data workers are forked at the first, when no thread may hold a lock."""
    if run.checkpoints:
        note(run, run.checkpoints.settle)
    yield from run.windows.start(run.state.window)


def finish(run: Run) -> None:
    """Raise on all ranks what one could not write, and wait until the last checkpoint is on the disk."""
    raise_trouble(run)
    if run.checkpoints:
        run.checkpoints.finish()


def accumulate(run: Run, window: list[Batch], targets: Mapping[str, int]) -> None:
    """Add the gradients of all micro-batches; the last one always synchronises the ranks."""
    if run.buffers:
        run.buffers.begin()
    for micro_step, batch in enumerate(window, start=1):
        samples = ", ".join(batch.ids)
        place = f"at step {run.state.step}, on rank {run.world.rank}, in the micro-batch of the samples {samples}"
        with happening(place, name_own=True), no_sync(run.module, micro_step < len(window)):
            run.meter.add(forward_backward(run, batch, targets))


def update(run: Run) -> StepResult:
    """Apply the window's gradients, or skip them, on all ranks alike.

    Raises:
        InterruptedUpdate: the optimizer failed half-way; says which checkpoint to go on from.
    """
    try:
        result = run.policy.step(run.optimizer, run.max_norm, run.buffers.floats() if run.buffers else ())
    except InterruptedUpdate as error:
        slot = run.checkpoints.newest() if run.checkpoints else None
        advice = f"go on from it with --resume {slot}" if slot else "nothing was saved yet: start anew"
        raise InterruptedUpdate(f"{error}; {advice}") from error
    if run.buffers:
        settle_buffers(run, run.buffers, result)
    return result


def settle_buffers(run: Run, buffers: MovingBuffers, result: StepResult) -> None:
    """Make the buffers that the window has moved equal on all ranks, or, of one that was skipped, as they were."""
    buffers.agree(run.world) if result.applied else buffers.put_back()
    trouble = buffers.trouble()
    if trouble:
        run.trouble = run.trouble or TrainingError(f"window {run.state.window} {trouble}")


def advance(run: Run, result: StepResult, window: list[Batch], progress: Any) -> None:
    """Count an applied update, and write a line about the steps since the last one if it is due."""
    state = run.state
    state.step += 1
    state.samples += sum(len(batch.ids) for batch in window) * run.world.size
    progress.update(1)
    if state.step % run.log_every == 0 or state.step >= run.total_steps:
        log(run, result, progress)


def log(run: Run, result: StepResult, progress: Any) -> None:
    """Write a line with the mean losses since the last one, over all ranks."""
    state = run.state
    means = run.meter.take(run.world)
    loss = sum(run.weights[s] * means[f"loss/{s}"] for s in run.weights if f"loss/{s}" in means)
    values: dict[str, float | str] = {
        "loss": loss,
        **means,
        "grad_norm": result.grad_norm,
        "lr": run.optimizer.param_groups[0]["lr"],
        "epoch": state.samples / run.windows.num_samples,
        "skipped": float(state.skipped),
        "precision": run.policy.name,
        **({"loss_scale": run.policy.scaler.scale} if run.policy.scaler else {}),
        "samples_per_second": run.meter.speed(state.samples),
    }
    note(run, lambda: run.records.metrics(state.step, values))
    progress.set_postfix(loss=f"{loss:.4f}", refresh=False)
    run.meter.restart_clock(state.samples)


def forward_backward(run: Run, batch: Batch, targets: Mapping[str, int]) -> dict[str, StreamLoss]:
    """Score one micro-batch and add its gradients; `targets` are those of the whole window, over all ranks."""
    with run.policy.autocast():
        losses: dict[str, StreamLoss] = run.module(batch.to(run.world.device))
    moved = run.buffers.values() if run.buffers and run.buffers.twice else None
    run.policy.backward(weighted_mean(losses, run.weights, targets, run.world.size))
    if run.buffers and moved is not None:
        run.buffers.write(moved)
    return losses


def take_window(windows: Iterator[list[Batch]], run: Run) -> tuple[list[Batch], dict[str, int]]:
    """Take the next window and agree, in one reduction, on its target counts over all ranks, and on going on at all.

    Raises:
        Preempted: some rank is to stop; raised on every rank, before the window is used.
        RawloopError: a sample is unusable on some rank, or its data has come to an end; raised on every rank, naming
            rank and sample.
        UserError: no rank has any target.
    """
    error = run.trouble
    stop = run.preemption.wanted() if run.preemption else None
    window: list[Batch] = []
    try:
        window = next(windows) if stop is None else []
    except StopIteration:
        ended = f"the training data came to an end before window {run.state.window}, {run.total_steps} steps are asked"
        error = error or UserError(f"{ended} for: windows must come without end, on every rank (begin anew at theirs)")
    except RawloopError as caught:
        error = error or caught
    own = [float(sum(batch.targets.get(stream, 0) for batch in window)) for stream in run.weights]
    failed, stopping, *counts = run.world.sum([float(error is not None), float(stop is not None), *own])
    if failed:
        run.world.on_all_ranks(lambda: _raise(error))
    if stopping:
        leave(run, agreed(run.world.gather(stop)) or "")
    targets = {stream: int(count) for stream, count in zip(run.weights, counts, strict=True)}
    if not any(targets.values()):
        shares = run.world.gather([name for batch in window for name in batch.ids])
        names = ", ".join(name for share in shares for name in share)
        raise run.world.raised_on_all(
            UserError(
                f"window {run.state.window} has no target in any stream: every label of its samples ({names}) is "
                "masked; look at them with `rawloop inspect --sample ID`, mend their labels, or leave them out"
            )
        )
    return window, targets


def leave(run: Run, reason: str) -> NoReturn:
    """Bring where the run stands to the disk, and end it on all ranks.

    Raises:
        Preempted: always, unless something else is wrong.
    """
    step = run.state.step
    raise_trouble(run)
    slot = run.checkpoints.secure(step) if run.checkpoints else None
    raise_trouble(run)
    kept = f"checkpoint: {slot}; go on from it with --resume latest" if slot else "nothing is saved"
    try:
        if run.world.is_main:
            run.records.event("stop", step=step, reason=f"stopped by {reason}")
    except RawloopError as error:  # the stop itself is done, and alike on all ranks
        kept += f" (it is in no record: {error})"
    raise Preempted(f"stopped by {reason} at step {step}; {kept}", is_reporter=run.world.is_main)


def note(run: Run, write: Callable[[], None]) -> None:
    """Write a record. What the disk refuses on one rank is raised on all of them at the next step's agreement."""
    try:
        write()
    except RawloopError as error:
        run.trouble = run.trouble or error


def _raise(error: RawloopError | None) -> None:
    if error is not None:
        raise error


def evaluate_and_save(run: Run, last: bool) -> bool:
    """Evaluate if due; save if due, or if the evaluation is the best so far. The two cadences never meet.

    Returns:
        whether the run ends here: it is the last step, or the evaluation has not improved for long enough.
    """
    state, best = run.state, None
    evaluation = evaluate(run, last)
    state.visited = state.step
    if run.checkpoints:
        run.checkpoints.changed()
    if evaluation is not None:
        note(run, lambda: run.records.metrics(state.step, evaluation.metrics))
        if not evaluation.valid and run.world.is_main:
            reason = f"evaluation is not finite in the batches of {', '.join(evaluation.bad_ids)}: it is never the best"
            note(run, lambda: run.records.event("warning", step=state.step, reason=reason))
        if run.best:
            best = best_so_far(run, evaluation)
            last = stop_early(run) or last
    if run.checkpoints and (best or run.checkpoints.due(state.step, last)):
        raise_trouble(run)
        run.checkpoints.save(state.step, best=best)
    return last


def raise_trouble(run: Run) -> None:
    """Raise on all ranks what one could not write: a checkpoint must not say that lines stand that do not."""
    run.world.on_all_ranks(lambda: _raise(run.trouble))


def evaluate(run: Run, last: bool) -> Evaluation | None:
    """Evaluate if due. A run that is stopped meanwhile is left as before, so that it is done after the resume."""
    if run.evaluator is None or not run.evaluator.due(run.state.step, last):
        return None
    if run.checkpoints:  # data workers are forked, and would inherit the locks of a thread that is writing
        note(run, run.checkpoints.settle)
    try:
        return run.evaluator.run(run.preemption.wanted if run.preemption else lambda: None)
    except Preempted as stop:
        leave(run, str(stop))


def best_so_far(run: Run, evaluation: Evaluation) -> BestRecord | None:
    """Return a record of the evaluation if it beats all before it whose models were written."""
    assert run.best is not None
    if run.best.metric not in evaluation.metrics:
        raise UserError(
            f"evaluation.best_metric is '{run.best.metric}', which the evaluation does not measure"
            f"{nearest(run.best.metric, evaluation.metrics)}: it measures {', '.join(evaluation.metrics)}"
        )
    if run.checkpoints:
        run.best.agree_with(run.checkpoints.best_record())
    beaten = run.best.consider(run.state.step, evaluation.metrics[run.best.metric], evaluation.valid)
    return run.best.record if beaten else None


def stop_early(run: Run) -> bool:
    """Whether `evaluation.patience` is used up; says so."""
    best = run.best
    if best is None or not best.exhausted:
        return False
    reason = f"{best.metric} has not improved in {best.worse_in_a_row} evaluations since step {best.step}"
    if run.world.is_main:
        note(run, lambda: run.records.event("stop", step=run.state.step, reason=reason))
    return True


def skip(run: Run, result: StepResult, window: list[Batch]) -> None:
    """Record a window whose update was not applied. Nothing advances but the data."""
    run.state.skipped += 1
    shares = run.world.gather([name for batch in window for name in batch.ids])
    ids = [name for share in shares for name in share]
    reason = result.skipped_because or ""
    if run.world.is_main:
        note(run, lambda: run.records.event("skip", step=run.state.step, reason=reason, samples=ids))
    if result.fell_back:
        rewrap(run, result.fell_back, window[0])


def trial_loss(module: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    """The sum of a micro-batch's losses, for the trial of a precision mode; an error names the samples."""
    with happening(f"in the trial of one pass, on the samples {', '.join(batch.ids)}", name_own=True):
        losses = module(batch.to(device))
    return torch.stack([loss.total for loss in losses.values()]).sum()


def rewrap(run: Run, change: str, batch: Batch) -> None:
    """Go on in the mode that all ranks have fallen back to: weights may be of another dtype, so DDP is built anew.

    The old DDP's hooks on the weights go with it, before the next one sets its own. In between the mode is tried on a
    batch, as every mode is before training: where the device cannot run the model in it, the next one is taken.
    """
    step, policy = run.state.step, run.policy
    assert run.wrap is not None or run.world.size == 1, "a run of several ranks must say how its module is wrapped"
    bare, run.module = unwrap_ddp(run.module), nn.Identity()
    gc.collect()
    entered = policy.name
    preflight(policy, partial(trial_loss, bare, batch, run.world.device))
    if policy.name != entered:
        change = f"{change} -> {policy.chain.trail().partition(f'{entered} -> ')[2]}"
    run.module = run.wrap() if run.wrap is not None else bare
    if run.world.is_main:
        note(run, lambda: run.records.event("fallback", step=step, reason=policy.reason, change=change))
    note(run, lambda: run.records.metrics(step, {"precision": policy.name, "fallback": change}))
