"""A run: the objects that the loop uses, its counters, and how it is evaluated, saved and stopped."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from rawloop.checkpoint.best import BestRecord, BestTracker
from rawloop.checkpoint.manager import CheckpointManager
from rawloop.contracts import Batch
from rawloop.data.batches import Loader
from rawloop.dist import World
from rawloop.errors import LESS_MEMORY, Preempted, RawloopError, UserError, nearest
from rawloop.evaluate import Evaluation, Evaluator
from rawloop.listen.files import write_heard
from rawloop.listen.listener import Listener
from rawloop.losses import Meter
from rawloop.moving_buffers import MovingBuffers
from rawloop.optim import use_average
from rawloop.precision.policy import PrecisionPolicy
from rawloop.preempt import Preemption, exit_code_after
from rawloop.records import Records
from rawloop.throughput import Throughput


@dataclass
class TrainState:
    """The counters of a run: applied updates (`step`), windows of data taken, skipped updates, and samples.

    `visited` is the last step at which the run has evaluated, if that was due. In the checkpoint of a run that was
    stopped during an evaluation it is smaller than `step`, so the resumed run starts with that evaluation. `left_out`
    has the windows of spikes, which are not used any more.
    """

    step: int = 0
    window: int = 0
    skipped: int = 0
    samples: int = 0
    visited: int = -1
    left_out: list[int] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """Return the counters."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the counters."""
        self.step, self.window = state["step"], state["window"]
        self.skipped, self.samples = state["skipped"], state["samples"]
        self.visited = state["visited"]
        self.left_out = list(state.get("left_out", []))


class Watcher(Protocol):
    """Sees the steps of a run, and changes none of their numbers."""

    def running(self, run: "Run") -> AbstractContextManager[None]:
        """Watch the whole run."""

    def step(self, run: "Run", window: list[Batch], targets: Mapping[str, int]) -> AbstractContextManager[None]:
        """Watch one step, from its first forward pass to its update. It adds what it knows to an error."""

    def before_pass(self) -> None:
        """See that a pass begins."""

    def after_pass(self, run: "Run", batch: Batch, loss: Tensor) -> None:
        """See a pass that is done; `loss` is unscaled."""

    def fields(self) -> dict[str, Any]:
        """Return JSON values for the event of a skip."""

    @property
    def rolls_back(self) -> bool:
        """Whether a skipped spike is to be followed by going back to the last checkpoint."""

    def check(self, run: "Run") -> None:
        """Raise TrainingError, on all ranks, if spikes are no exceptions any more."""

    def restart(self) -> None:
        """See that the run has gone back to a checkpoint."""

    def finish(self) -> None:
        """See the end of the run."""


@dataclass
class Run:
    """All objects of a run, ready for the loop. Those with the default None are optional.

    Args:
        module: the `LossModule` that is called, in DDP or not. Its submodules keep their training or evaluation mode.
        windows: called with a number, returns this rank's windows from that number on, without end. A window is a list
            of micro-batches on the CPU. The loop takes the next window while the device works, so `windows` must not
            draw from the global random streams.
        policy: has prepared the model.
        optimizer: the parameter group with the largest learning rate gets `lr(step)`, the others keep their ratio.
        lr: returns the learning rate of the update from `step` to `step + 1`.
        total_steps: number of updates.
        weights: each stream's weight in the loss.
        num_samples: samples per epoch; 0 leaves the epoch out of the log.
        buffers: the buffers that training moves; found with the first batch if None.
        wrap: builds `module` again, in DDP or not, after the precision policy has fallen back.
        deferred_error: an error in writing records on this rank, until it is raised on all ranks.
        loaders: `close` ends their workers.
        watch: sees every step.
        listener: hears the model at evaluations.
        what_would_fit: called if memory is used up, on that rank alone; returns what takes less.
    """

    module: nn.Module
    windows: Callable[[int], Iterable[list[Batch]]]
    policy: PrecisionPolicy
    optimizer: Optimizer
    lr: Callable[[int], float]
    total_steps: int
    weights: Mapping[str, float]
    records: Records
    num_samples: int = 0
    world: World = field(default_factory=World.current)
    state: TrainState = field(default_factory=TrainState)
    meter: Meter = field(default_factory=Meter)
    throughput: Throughput = field(default_factory=Throughput)
    buffers: MovingBuffers | None = None
    evaluator: Evaluator | None = None
    checkpoints: CheckpointManager | None = None
    best: BestTracker | None = None
    preemption: Preemption | None = None
    max_norm: float = 1.0
    log_every: int = 10
    wrap: Callable[[], nn.Module] | None = None
    deferred_error: Exception | None = None
    loaders: Sequence[Loader] = ()
    watch: Watcher | None = None
    listener: Listener | None = None
    what_would_fit: Callable[[], str] = lambda: LESS_MEMORY

    def record_or_defer(self, write: Callable[[], None]) -> None:
        """Write a record. An error on one rank is raised on all ranks in the next step."""
        try:
            write()
        except Exception as error:
            self.deferred_error = self.deferred_error or error

    def raise_deferred(self) -> None:
        """Raise the deferred error of any rank on all ranks: a checkpoint needs the lines that it counts."""
        self.world.on_all_ranks(lambda: raise_if(self.deferred_error))

    def wait_until_written(self) -> None:
        """Wait for a running save. The other ranks wait as long as it takes."""
        if self.checkpoints:
            with self.world.working():
                self.record_or_defer(self.checkpoints.wait_until_written)

    def save_and_stop(self, reason: str) -> NoReturn:
        """Save the run, and end it on all ranks.

        Raises:
            Preempted: always, unless it cannot be saved.
        """
        step = self.state.step
        self.raise_deferred()
        use_average(self.optimizer)
        slot = self.checkpoints.ensure_saved(step) if self.checkpoints else None
        self.raise_deferred()
        kept = f"checkpoint: {slot}; continue from it with --resume latest" if slot else "nothing is saved"
        try:
            if self.world.is_main:
                self.records.event("stop", step=step, reason=f"stopped by {reason}")
        except RawloopError as error:  # the run has stopped on all ranks, and is saved
            kept += f" (it is in no record: {error})"
        stop = Preempted(f"stopped by {reason} at step {step}; {kept}", is_reporter=self.world.is_main)
        stop.exit_code = exit_code_after(reason)
        raise stop

    def finish(self) -> None:
        """Raise deferred errors, and wait until the last checkpoint is on the disk."""
        self.raise_deferred()
        if self.checkpoints:
            self.checkpoints.finish()
        self.records.is_complete = True

    def close(self) -> None:
        """End the data workers, wait for a running save, unlock the folder and close the records."""
        with ExitStack() as stack:  # each is closed, in reversed order, whatever another raises
            stack.callback(self.records.close)
            if self.checkpoints:
                stack.callback(self.checkpoints.close)
            for loader in self.loaders:
                stack.callback(loader.close)
            if self.watch:
                stack.callback(self.watch.finish)


def evaluate_and_save(run: Run, last: bool) -> bool:
    """Evaluate if due; save if due, or if the evaluation is the best so far. The two cadences are independent.

    Returns:
        whether the run ends here: it is the last step, or `evaluation.patience` is used up.
    """
    state, best = run.state, None
    evaluation = evaluate(run, last)
    state.visited = state.step
    if run.checkpoints:
        run.checkpoints.mark_changed()
    if evaluation is not None:
        run.record_or_defer(lambda: run.records.metrics(state.step, evaluation.metrics))
        if not evaluation.valid and run.world.is_main:
            reason = f"evaluation is not finite in the batches of {', '.join(evaluation.bad_ids)}: it is never the best"
            run.record_or_defer(lambda: run.records.event("warning", step=state.step, reason=reason))
        if run.best:
            best = best_so_far(run, evaluation)
            last = stop_early(run) or last
    if run.checkpoints and (best or run.checkpoints.due(state.step, last)):
        run.raise_deferred()
        use_average(run.optimizer)
        run.checkpoints.save(state.step, best=best)
    return last


def evaluate(run: Run, last: bool) -> Evaluation | None:
    """Evaluate if due. After a stop during the evaluation, the resumed run evaluates again."""
    if run.evaluator is None or not run.evaluator.due(run.state.step, last):
        return None
    run.wait_until_written()  # data workers are forked, and would inherit the locks of a thread that is writing
    use_average(run.optimizer)
    wanted = run.preemption.wanted if run.preemption else lambda: None
    try:
        evaluation = run.evaluator.run(wanted)
        if run.listener is None or not run.listener.due(run.state.step, last):
            return evaluation
        return evaluation._replace(metrics=evaluation.metrics | listen(run, run.listener, wanted))
    except Preempted as stop:
        run.save_and_stop(str(stop))


def listen(run: Run, listener: Listener, wanted: Callable[[], str | None]) -> dict[str, float]:
    """Hear the model, record the clips on rank 0, and return the metrics."""
    metrics, heard = listener.listen(wanted)
    if run.world.is_main:
        step = run.state.step
        run.record_or_defer(lambda: run.records.sounds(step, write_heard(run.records.folder, step, heard)))
    return metrics


def best_so_far(run: Run, evaluation: Evaluation) -> BestRecord | None:
    """Return a record of the evaluation if it is better than all earlier ones whose checkpoints were written."""
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
    """Return whether `evaluation.patience` is used up, and record it."""
    best = run.best
    if best is None or not best.exhausted:
        return False
    reason = f"{best.metric} has not improved in {best.worse_in_a_row} evaluations since step {best.step}"
    if run.world.is_main:
        run.record_or_defer(lambda: run.records.event("stop", step=run.state.step, reason=reason))
    return True


def raise_if(error: Exception | None) -> None:
    """Raise an error, if there is one."""
    if error is not None:
        raise error
