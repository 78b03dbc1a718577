"""Checkpoints for your own loop: saves and restores plain objects, in one `with` block.

`CheckpointManager` writes and reads, `BestTracker` compares. This module turns models, optimizers and schedulers into
parts, and decides when to save.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from operator import index
from pathlib import Path
from typing import Any, Self, SupportsIndex

from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from rawloop.adapters.parts import What, model_parts
from rawloop.checkpoint.best import BestRecord, BestTracker, Mode
from rawloop.checkpoint.config import CheckpointConfig
from rawloop.checkpoint.manager import CheckpointManager
from rawloop.checkpoint.slots import find_slots
from rawloop.checkpoint.writer import wait_for_saves
from rawloop.contracts import FolderState, Stateful
from rawloop.dist import World
from rawloop.errors import RawloopError, UserError, nearest
from rawloop.evaluate import Evaluation
from rawloop.inputs import unwrap
from rawloop.optim_state import NamedOptimizerState, SchedulerState
from rawloop.records import Log, Records, to_stderr
from rawloop.seed import RngState

Parts = dict[str, Stateful | FolderState]


class Checkpoints:
    """Saves a training loop and resumes it, bit for bit.

    The random states of all ranks are saved too. All ranks must construct it and call its methods; `metrics` may be
    given on one rank only.

    Args:
        folder: the run folder. Rank 0 locks it until the block ends.
        model: a module, with or without DDP, or a list or dict of modules.
        optimizer: an optimizer, or a list or dict of optimizers. Their parameter groups are saved too.
        scheduler: a torch scheduler, any object with `state_dict` and `load_state_dict`, or a list or dict of these.
        policy: the `PrecisionPolicy` that has prepared the model.
        extra: further state: an object with `state_dict` and `load_state_dict`, a dict of these by name, or a dict of
            plain values, which is updated in place on a resume.
        what: `auto` saves PEFT adapters and all other trained weights, or the whole model if it has no adapter; `all`
            saves all weights; `trained` saves the weights that are trained when this object is constructed.
        save_every: steps between two checkpoints; 0 saves at the end only.
        keep_last: how many of the newest checkpoints to keep, besides the best one.
        best_metric: the metric of the best checkpoint, among the metrics given to `save`.
        best_mode: whether smaller (`min`) or larger (`max`) is better.
        config: all settings, instead of `save_every` and `keep_last`.
        world: the ranks; by default those of torch.distributed.
        seed: for the random streams of ranks without a stored state.
        log: called with each event, such as `logging.getLogger("run").info`; None logs nothing.

    Raises:
        UserError: a part cannot be saved, or another process trains into the folder.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        model: Any,
        optimizer: Any = None,
        scheduler: Any = None,
        policy: Any = None,
        extra: Any = None,
        what: What = "auto",
        save_every: int = 500,
        keep_last: int = 3,
        best_metric: str = "eval_loss",
        best_mode: Mode = "min",
        config: CheckpointConfig | None = None,
        world: World | None = None,
        seed: int = 0,
        log: Log = to_stderr,
    ) -> None:
        self.folder = Path(folder)
        self.world: World = world or getattr(policy, "world", None) or World.current()
        self.best = BestTracker(best_metric, best_mode)
        config = config or CheckpointConfig(save_every=save_every, keep_last=keep_last)
        parts = self.world.on_all_ranks(lambda: _parts(model, optimizer, scheduler, policy, what, extra))
        assert parts is not None
        parts |= {"best": self.best, "rng": RngState(seed, self.world.rank)}
        self.records = Records(self.folder, self.world, log=log)
        try:
            self.manager = CheckpointManager(self.folder, config, self.world, self.records, parts)
        except BaseException:
            self.records.close()
            raise
        self._done: int | None = None  # number of updates; None before resume_or_start
        self._saved = -1
        self._deferred: RawloopError | None = None  # raised on all ranks at the next save

    def resume_or_start(self) -> int:
        """Restore the newest whole checkpoint of the folder, if there is one, and prepare the folder.

        Returns:
            the index of the first step to run: 0 in a new folder.

        Raises:
            CheckpointError: no checkpoint is whole, or its parts differ from these; nothing is changed then.
        """
        wait_for_saves()  # an earlier run of a notebook's cell may still be saving into this folder
        there = self.world.on_all_ranks(lambda: bool(find_slots(self.folder)), only_main=True)
        done = 0
        if self.world.from_main(there):
            done = self.manager.load().step
            self.best.agree_with(self.manager.best_record())
        self.manager.start(done)
        self.records.rewind(done)
        self._done, self._saved = done, done
        return done

    def save(
        self, step: SupportsIndex, metrics: Evaluation | Mapping[str, float] | None = None, *, now: bool = False
    ) -> bool:
        """Save if a checkpoint is due after the update with index `step`. Call it at the end of each step on all ranks.

        A checkpoint is named after the number of updates, `step` + 1. `metrics` go into `metrics.jsonl`; if they are
        the best so far, a checkpoint is written and `best` points to it.

        Args:
            step: the index of the step, from 0.
            metrics: of an evaluation after this step, on one rank or on all; the first rank's metrics are used.
            now: save even if no checkpoint is due.

        Returns:
            whether a checkpoint of this step is written.

        Raises:
            UserError: `resume_or_start` was not called, the steps are not in order, or `best_metric` is missing.
            CheckpointError: several saves in a row failed.
        """
        done = self._checked(step)
        record = None
        measured, asked = self.world.any([metrics is not None, now])
        if measured:
            given = next(filter(None, self.world.gather(_plain(metrics))))
            record = self._best_of(done, *given)
        self._done = done
        if record is not None or asked or self.manager.due(done, last=False):
            self._write(record)
        elif self._deferred is None:
            try:
                self.manager.poll()
            except RawloopError as error:
                self._deferred = error
        return self._saved == done

    def _checked(self, step: SupportsIndex) -> int:
        if self._done is None:
            raise UserError(
                "checkpoints.save was called before checkpoints.resume_or_start(): call that first, and start the loop "
                "at the step that it returns"
            )
        done = index(step) + 1
        if done < self._done:
            raise UserError(
                f"checkpoints.save({done - 1}) comes after step {self._done - 1}: pass the index of the step, which "
                f"starts at the value that resume_or_start returns, and grows"
            )
        return done

    def _best_of(self, done: int, values: dict[str, float], valid: bool) -> BestRecord | None:
        """Write the metrics into metrics.jsonl. Returns a record of them if they are the best so far."""
        metric, mode = self.best.metric, self.best.mode
        if metric not in values:
            known = ", ".join(values) or "none"
            raise UserError(
                f"best_metric is '{metric}', which is not among the metrics{nearest(metric, values)}: {known}"
            )
        self.world.on_all_ranks(lambda: self.records.metrics(done, values), only_main=True)
        if self.best.value is not None:
            self.best.agree_with(self.manager.best_record())  # the save of a better model may have failed
        self.manager.mark_changed()
        value = float(values[metric])
        return BestRecord(metric, mode, value, done) if self.best.consider(done, value, valid) else None

    def _write(self, record: BestRecord | None) -> None:
        assert self._done is not None
        self.world.on_all_ranks(self._raise_deferred, only_main=True)
        self.manager.save(self._done, best=record)
        self._saved = self._done

    def _raise_deferred(self) -> None:
        if self._deferred is not None:
            raise self._deferred

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for a running save. If the block ended without an exception, save the last step before."""
        try:
            if kind is None and self._done is not None:
                if self._saved != self._done and self.manager.config.save_at_end:
                    self._write(None)
                self.manager.finish()
        finally:
            self.close()

    def close(self) -> None:
        """Wait for a running save and unlock the folder. It may be called again."""
        try:
            self.manager.close()
        finally:
            self.records.close()


def _by_name(kind: str, given: Any) -> dict[str, Any]:
    """Return the objects of a list or dict as `kind.key`, and a single object as `kind`."""
    if given is None:
        return {}
    if isinstance(given, Mapping):
        return {f"{kind}.{key}": item for key, item in given.items()}
    if isinstance(given, list | tuple):
        return {f"{kind}.{number}": item for number, item in enumerate(given)}
    return {kind: given}


def _parts(model: Any, optimizer: Any, scheduler: Any, policy: Any, what: What, extra: Any) -> Parts:
    models, optimizers = _by_name("model", model), _by_name("optimizer", optimizer)
    parts: Parts = {}
    for name, module in models.items():
        if not isinstance(module, nn.Module):
            kind = type(module).__name__
            raise UserError(f"a model of the checkpoints is a {kind}: pass modules, or state as `extra`")
        models[name] = unwrap(module)
        parts |= model_parts(models[name], name, what)
    if policy is not None:
        policy.adopt(*optimizers.values())
        parts["precision"] = policy
    torch_optimizers = {name: getattr(it, "optimizer", it) for name, it in optimizers.items()}  # accelerate wraps them
    for name, it in torch_optimizers.items():
        parts[name] = NamedOptimizerState(it, partial(_named, models, policy))
    for name, given in _by_name("scheduler", scheduler).items():
        of_torch = getattr(given, "scheduler", given)
        if not isinstance(of_torch, LRScheduler):
            parts[name] = given
            continue
        if not any(of_torch.optimizer is it for it in torch_optimizers.values()):
            raise UserError(
                f"{name} sets the learning rate of an optimizer that is not saved: pass it as `optimizer`, too; its "
                "state has the learning rate"
            )
        parts[name] = SchedulerState(of_torch)
    if extra is None:
        return parts
    if isinstance(extra, dict) and any(isinstance(value, Stateful | FolderState) for value in extra.values()):
        return {**parts, **extra}
    return {**parts, "extra": DictState(extra) if isinstance(extra, dict) else extra}


def _named(models: dict[str, nn.Module], policy: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters that optimizers may hold: those of the models, and of the policy, which may be masters."""
    for key, model in models.items():
        prefix = f"{key}." if len(models) > 1 else ""
        yield from ((prefix + name, parameter) for name, parameter in model.named_parameters())
    yield from policy.named_parameters() if policy is not None else ()


class DictState:
    """A dict of plain values as a part of a checkpoint. Loading updates the dict in place."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def state_dict(self) -> dict[str, Any]:
        """Return the values."""
        return dict(self.values)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the values by the stored ones."""
        self.values.clear()
        self.values.update(state)


def _plain(metrics: Any) -> tuple[dict[str, float], bool] | None:
    if metrics is None:
        return None
    values, valid = (metrics.metrics, metrics.valid) if isinstance(metrics, Evaluation) else (metrics, True)
    return {name: float(value) for name, value in values.items()}, valid
