"""The training loop. It receives finished objects and constructs nothing.

One step: sum the target counts of the window over all ranks, forward and backward, fetch the next window while the
device works, clip and update, log; then evaluate, save, stop. The loop visits the last step once more after its update,
so evaluation and saving have one call site each.
"""

from collections.abc import Generator, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

from rawloop.contracts import Batch, StreamLoss
from rawloop.dist import no_sync, unwrap_ddp
from rawloop.errors import InterruptedUpdate, TrainingError, UserError, happening, is_out_of_memory
from rawloop.losses import LossModule, weighted_mean
from rawloop.moving_buffers import MovingBuffers
from rawloop.optim import set_lr, use_trained
from rawloop.precision.gradients import ELSEWHERE, StepResult
from rawloop.preempt import first_reason
from rawloop.progress import Progress
from rawloop.rebuild import find_buffers, rebuild_ddp, roll_back
from rawloop.run import Run as Run
from rawloop.run import TrainState, evaluate_and_save, raise_if, stop_early
from rawloop.settings import TrainConfig as TrainConfig
from rawloop.throughput import Throughput


class Fetched(NamedTuple):
    """The next window, or the error of the data; neither at the end of the data."""

    window: list[Batch] | None
    error: Exception | None = None


def train(run: Run) -> TrainState:
    """Train from `run.state` on, until `total_steps` updates are applied.

    Raises:
        UserError: the model is in evaluation mode.
        TrainingError: training cannot go on correctly.
        Preempted: `run.preemption` asked a rank to stop; the run is saved.
        Exception: the error of any rank, on all ranks.
    """
    state = run.state
    check_training_mode(run)
    windows, fetched = start_windows(run), None
    run.throughput.restart_clock(state.step, state.samples)
    stopped = stop_early(run)  # the patience may have been used up before this resume
    watched = run.watch.running(run) if run.watch else nullcontext()
    every = run.evaluator.every if run.evaluator else None
    with watched, run.records.progress(run.total_steps, state.step, every) as progress:
        while True:
            last = state.step >= run.total_steps or stopped
            if state.step != state.visited:
                last = evaluate_and_save(run, last)
                run.throughput.restart_clock(state.step, state.samples)
            if last:
                run.finish()
                return state

            fetched = fetched or fetch(windows, run.throughput)
            if state.window in state.left_out:
                state.window, fetched = state.window + 1, None
                continue
            window, targets, samples = agree_on_window(run, fetched)
            run.buffers = find_buffers(run, window[0]) if run.buffers is None else run.buffers
            use_trained(run.optimizer)
            set_lr(run.optimizer, run.lr(state.step))
            with run.watch.step(run, window, targets) if run.watch else nullcontext():
                accumulate(run, window, targets)
                # The device is busy until `update` waits for it. The last window has no successor.
                fetched = fetch(windows, run.throughput) if state.step + 1 < run.total_steps else None
                result = update(run, window)

            if run.checkpoints:
                run.record_or_defer(run.checkpoints.poll)
            state.window += 1
            if result.applied:
                advance(run, result, samples, progress)
            else:
                skip(run, result, window)
            if result.objected and run.watch and run.watch.rolls_back and roll_back(run):
                windows.close()
                windows, fetched = start_windows(run), None
                run.throughput.restart_clock(state.step, state.samples)
                progress.move_to(state.step)


def check_training_mode(run: Run) -> None:
    """Refuse a model in evaluation mode, as `from_pretrained` returns it. Parts of it may be, such as frozen norms."""
    module = unwrap_ddp(run.module)
    model = module.model if isinstance(module, LossModule) else module
    if not model.training:
        raise UserError(
            f"the model ({type(model).__name__}) is in evaluation mode, without dropout: call model.train() before "
            "training; then .eval() on the parts that shall stay in it"
        )


def start_windows(run: Run) -> Generator[list[Batch]]:
    """Yield the windows from the next one on. Data workers are forked here, when no thread that saves holds a lock."""
    run.wait_until_written()
    yield from run.windows(run.state.window)


def fetch(windows: Iterator[list[Batch]], throughput: Throughput) -> Fetched:
    """Return the next window, or the error of the data, which `agree_on_window` raises on all ranks."""
    with throughput.waiting():
        try:
            return Fetched(next(windows, None))
        except Exception as error:
            return Fetched(None, error)


def agree_on_window(run: Run, fetched: Fetched) -> tuple[list[Batch], dict[str, int], int]:
    """Sum the target counts of the window over all ranks; in the same reduction, learn whether a rank must stop.

    Returns:
        the window, the counts by stream, and the number of samples over all ranks.

    Raises:
        Preempted: a rank was asked to stop; raised on every rank, before the window is used.
        Exception: a rank has no window, or could not write its records; raised on every rank.
        UserError: no rank has a target.
    """
    stop = run.preemption.wanted() if run.preemption else None
    if stop is not None:
        fetched = Fetched([])  # an error will be raised again after the resume
    window = fetched.window or []
    error = run.deferred_error or fetched.error
    if fetched.window is None and error is None:
        ended = f"the training data ended before window {run.state.window}, and the run has {run.total_steps} steps"
        error = UserError(f"{ended}: `windows` must never end, on any rank; start over at the end of the data")
    here = [float(sum(batch.targets.get(stream, 0) for batch in window)) for stream in run.weights]
    here.append(float(sum(len(batch.ids) for batch in window)))
    failed, stopping, *counts, samples = run.world.sum([float(error is not None), float(stop is not None), *here])
    if failed:
        run.world.on_all_ranks(lambda: raise_if(error))
    if stopping:
        run.save_and_stop(first_reason(run.world.gather(stop)) or "")
    targets = {stream: int(count) for stream, count in zip(run.weights, counts, strict=True)}
    if not any(targets.values()):
        raise run.world.raised_on_all(
            UserError(
                f"window {run.state.window} has no target in any stream: every label of its samples "
                f"({', '.join(samples_of_all_ranks(run, window))}) is masked; look at them with "
                "`rawloop inspect --sample ID`, mend their labels, or leave them out"
            )
        )
    return window, targets, int(samples)


def samples_of_all_ranks(run: Run, window: list[Batch]) -> list[str]:
    """Return the ids of the samples in the ranks' windows. All ranks call this."""
    shares = run.world.gather([name for batch in window for name in batch.ids])
    return [name for share in shares for name in share]


def accumulate(run: Run, window: list[Batch], targets: Mapping[str, int]) -> None:
    """Run forward and backward on all micro-batches. DDP averages the gradients with the last one."""
    if run.buffers:
        run.buffers.start_window()
    for micro_step, batch in enumerate(window, start=1):
        with naming_samples(run, "micro-batch", [batch], name_own=True), no_sync(run.module, micro_step < len(window)):
            run.meter.add(forward_backward(run, batch, targets))
            run.throughput.count(batch)


def forward_backward(run: Run, batch: Batch, targets: Mapping[str, int]) -> dict[str, StreamLoss]:
    """Run forward and backward on one micro-batch. `targets` counts the whole window, over all ranks."""
    if run.watch:
        run.watch.before_pass()
    with run.policy.autocast():
        losses: dict[str, StreamLoss] = run.module(batch.to(run.world.device))
    # Activation checkpointing runs the forward pass again: buffers must not move twice.
    moved = run.buffers.values() if run.buffers and run.buffers.twice else None
    loss = weighted_mean(losses, run.weights, targets, run.world.size)
    run.policy.backward(loss)
    if run.watch:
        run.watch.after_pass(run, batch, loss)
    if run.buffers and moved is not None:
        run.buffers.write(moved)
    return losses


def naming_samples(run: Run, group: str, batches: list[Batch], name_own: bool = False) -> AbstractContextManager[None]:
    """Add to an error the samples in which it happened, and to an out-of-memory error how to use less."""
    names = ", ".join(name for batch in batches for name in batch.ids)
    place = f"at step {run.state.step}, on rank {run.world.rank}, in the {group} of the samples {names}"
    return happening(place, name_own=name_own, less=partial(memory_advice, run, batches))


def memory_advice(run: Run, batches: list[Batch]) -> str:
    """Return the shapes that fill the memory, and the settings that use less."""
    largest = max(batches, key=lambda batch: sum(tensor.numel() for tensor in batch.inputs.values()))
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in largest.inputs.items())
    return f"its inputs have the shapes {shapes}; {run.what_would_fit()}"


def update(run: Run, window: list[Batch]) -> StepResult:
    """Apply the window's gradients on all ranks, or skip them on all.

    The host waits for the device here, so errors of CUDA kernels are raised here.

    Raises:
        InterruptedUpdate: the optimizer failed in the middle; the message names the checkpoint to resume from.
    """
    try:
        with naming_samples(run, "window", window):
            result = run.policy.step(run.optimizer, run.max_norm, run.buffers.floats() if run.buffers else ())
    except InterruptedUpdate as error:
        slot = run.checkpoints.newest() if run.checkpoints else None
        advice = f"continue from it with --resume {slot}" if slot else "nothing was saved yet: start anew"
        if error.__cause__ is not None and is_out_of_memory(error.__cause__):
            advice += f"; {memory_advice(run, window)}"
        raise InterruptedUpdate(f"{error}; {advice}") from error
    if run.buffers:
        sync_buffers(run, run.buffers, result)
    return result


def sync_buffers(run: Run, buffers: MovingBuffers, result: StepResult) -> None:
    """Make the buffers that the window has moved equal on all ranks; put them back if the window was skipped."""
    buffers.make_equal(run.world) if result.applied else buffers.restore()
    if problem := buffers.problem():
        run.deferred_error = run.deferred_error or TrainingError(f"window {run.state.window} {problem}")


def advance(run: Run, result: StepResult, samples: int, progress: Progress) -> None:
    """Count an applied update of so many samples, and log if it is due."""
    state = run.state
    state.step += 1
    state.samples += samples
    progress.move_to(state.step)
    if state.step % run.log_every == 0 or state.step >= run.total_steps:
        log(run, result)


def log(run: Run, result: StepResult) -> None:
    """Write the mean losses since the last line, over all ranks."""
    state = run.state
    means = run.meter.take(run.world)
    loss = sum(run.weights[s] * means[f"loss/{s}"] for s in run.weights if f"loss/{s}" in means)
    values: dict[str, float | str] = {
        "loss": loss,
        **means,
        "grad_norm": result.grad_norm,
        "lr": max(group["lr"] for group in run.optimizer.param_groups),
        **({"epoch": state.samples / run.num_samples} if run.num_samples else {}),
        "skipped": float(state.skipped),
        "precision": run.policy.name,
        **({"loss_scale": run.policy.scaler.scale} if run.policy.scaler else {}),
        **run.throughput.speed(state.step, state.samples, run.world),
    }
    run.record_or_defer(lambda: run.records.metrics(state.step, values))
    run.throughput.restart_clock(state.step, state.samples)


def skip(run: Run, result: StepResult, window: list[Batch]) -> None:
    """Record a window whose update was not applied. The step stays, the data advances."""
    run.state.skipped += 1
    ids, reason = samples_of_all_ranks(run, window), result.skipped_because or ""
    if result.objected:
        reasons = [why if why != ELSEWHERE else None for why in run.world.gather(result.skipped_because)]
        reason = first_reason(reasons) or reason
    if run.world.is_main:
        fields: dict[str, Any] = {"samples": ids, "scale": result.scale}
        if run.policy.scaler:
            fields |= {"next_scale": run.policy.scaler.scale, "scale_floor": run.policy.scaler.config.floor}
        fields |= run.watch.fields() if run.watch else {}
        run.record_or_defer(lambda: run.records.event("skip", step=run.state.step, reason=reason, **fields))
    if run.watch:
        run.watch.check(run)
    if result.fell_back:
        rebuild_ddp(run, result.fell_back, window[0])
        run.throughput.cost = None  # its rate is that of the mode before
