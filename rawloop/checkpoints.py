"""Checkpoints for a loop of one's own: everything that a run must restore, from plain objects, in one `with` block.

`CheckpointManager` writes and reads, `BestTracker` compares. This module turns models, optimizers and schedulers into
parts, and decides when to save.
"""

import threading
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
from rawloop.contracts import FolderState, Stateful
from rawloop.dist import World, unwrap_ddp
from rawloop.errors import RawloopError, UserError, nearest
from rawloop.evaluate import Evaluation
from rawloop.optim_state import NamedOptimizerState, SchedulerState
from rawloop.records import Log, Records, to_stderr
from rawloop.seed import RngState

Parts = dict[str, Stateful | FolderState]


class Checkpoints:
    """Saves a training loop and resumes it, bit for bit.

    Random states of all ranks are included. All ranks construct it and call its methods; metrics may be given by one
    rank alone.

    Args:
        folder: of the run. Rank 0 locks it until the block ends.
        model: a module, with DDP around it or without, or a list or dict of modules.
        optimizer: one, or a list or dict of them. Their parameter groups are saved too.
        scheduler: of torch, or any object with `state_dict` and `load_state_dict`; or a list or dict of them.
        policy: the `PrecisionPolicy` that has prepared the model.
        extra: further state: an object with `state_dict` and `load_state_dict`, a dict of these by name, or a dict of
            plain values, which is updated in place on a resume.
        what: `auto` saves PEFT adapters and everything else that is trained, or the whole model if it has no adapter;
            `all` saves all weights, `trained` those that are trained when this is constructed.
        save_every: steps between two checkpoints; 0 saves at the end only.
        keep_last: newest checkpoints to keep; the best one is kept besides.
        best_metric: the metric of the best checkpoint, among those given to `save`.
        best_mode: whether smaller (`min`) or larger (`max`) is better.
        config: more settings, in place of `save_every` and `keep_last`.
        world: the ranks; those of torch.distributed by default.
        seed: for the random streams of ranks that a checkpoint of fewer ranks does not have.
        log: called with each event, such as `logging.getLogger("run").info`; None says nothing.

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
        models = {key: _unwrapped(module) for key, module in _by_name("model", model).items()}
        make = partial(_parts, models, _by_name("optimizer", optimizer), _by_name("scheduler", scheduler), policy, what)
        parts = self.world.on_all_ranks(lambda: {**make(), **_extra_parts(extra)})
        assert parts is not None
        parts |= {"best": self.best, "rng": RngState(seed, self.world.rank)}
        self.records = Records(self.folder, self.world, log=log)
        try:
            self.manager = CheckpointManager(self.folder, config, self.world, self.records, parts)
        except BaseException:
            self.records.close()
            raise
        self._done: int | None = None  # updates that the state has seen; None before resume_or_start
        self._saved = -1
        self._trouble: RawloopError | None = None

    def resume_or_start(self) -> int:
        """Restore the newest whole checkpoint of the folder, if there is one, and make the folder ready.

        Returns:
            the index of the first step to run: 0 in a new folder.

        Raises:
            CheckpointError: no checkpoint is whole, or they hold other parts; nothing is changed then.
        """
        for thread in threading.enumerate():
            if thread.name.startswith("rawloop-save-"):  # of a notebook's cell that was run before and is still open
                thread.join()
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
        """Save if it is due, after the update with index `step`. Call it at the end of each step, on all ranks.

        A checkpoint is named after the number of updates, `step` + 1. `metrics` go into `metrics.jsonl`; if they are
        the best so far, a checkpoint is written and `best` points to it.

        Args:
            step: the index of the step, from 0.
            metrics: of an evaluation after this step, on one rank or on all: the first rank's count.
            now: save whether it is due or not.

        Returns:
            whether a checkpoint is being written.

        Raises:
            UserError: `resume_or_start` was not called, the steps are not in order, or the metrics lack the best one.
            CheckpointError: several saves in a row could not be written.
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
        elif self._trouble is None:
            try:
                self.manager.poll()
            except RawloopError as error:  # raised on all ranks at the next save
                self._trouble = error
        return self._saved == done

    def _checked(self, step: SupportsIndex) -> int:
        if self._done is None:
            raise UserError(
                "checkpoints.save was called before checkpoints.resume_or_start(): call that first, and begin the loop "
                "at the step that it returns"
            )
        done = index(step) + 1
        if done < self._done:
            raise UserError(
                f"checkpoints.save({done - 1}) comes after step {self._done - 1}: pass the index of the step, which "
                f"begins at what resume_or_start returns and grows"
            )
        return done

    def _best_of(self, done: int, values: dict[str, float], valid: bool) -> BestRecord | None:
        """Record metrics. Returns the record if they are the best."""
        metric, mode = self.best.metric, self.best.mode
        if metric not in values:
            known = ", ".join(values) or "none"
            raise UserError(
                f"best_metric is '{metric}', which is not among the metrics{nearest(metric, values)}: {known}"
            )
        self.world.on_all_ranks(lambda: self.records.metrics(done, values), only_main=True)
        if self.best.value is not None:
            self.best.agree_with(self.manager.best_record())  # a save of a better one may have failed
        self.manager.changed()
        value = float(values[metric])
        return BestRecord(metric, mode, value, done) if self.best.consider(done, value, valid) else None

    def _write(self, record: BestRecord | None) -> None:
        assert self._done is not None
        self.world.on_all_ranks(self._raise_trouble, only_main=True)
        self.manager.save(self._done, best=record)
        self._saved = self._done

    def _raise_trouble(self) -> None:
        if self._trouble is not None:
            raise self._trouble

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for saves. A block that ends without an exception saves the last step first, if it is not saved."""
        try:
            if kind is None and self._done is not None:
                if self._saved != self._done and self.manager.config.save_at_end:
                    self._write(None)
                self.manager.finish()
        finally:
            self.close()

    def close(self) -> None:
        """Wait for the saves under way and unlock the folder. It may be called again."""
        try:
            self.manager.close()
        finally:
            self.records.close()


def _by_name(kind: str, given: Any) -> dict[str, Any]:
    """Name the objects of a list or dict after their kind; one alone has its kind's name."""
    if given is None:
        return {}
    if isinstance(given, Mapping):
        return {f"{kind}.{key}": item for key, item in given.items()}
    if isinstance(given, list | tuple):
        return {f"{kind}.{number}": item for number, item in enumerate(given)}
    return {kind: given}


def _unwrapped(model: Any) -> Any:
    """The module inside DDP and torch.compile, which put their own prefix before every name."""
    while isinstance(model, nn.Module):
        inner = model._modules.get("_orig_mod") or unwrap_ddp(model)
        if inner is model:
            return model
        model = inner
    raise UserError(f"a model of the checkpoints is a {type(model).__name__}: pass modules, or state as `extra`")


def _parts(
    models: dict[str, nn.Module], optimizers: dict[str, Any], schedulers: dict[str, Any], policy: Any, what: What
) -> Parts:
    parts: Parts = {}
    for name, model in models.items():
        parts |= model_parts(model, name, what)
    if policy is not None:
        policy.adopt(*optimizers.values())
        parts["precision"] = policy
    own = [getattr(optimizer, "optimizer", optimizer) for optimizer in optimizers.values()]  # accelerate wraps them
    for name, optimizer in zip(optimizers, own, strict=True):
        parts[name] = NamedOptimizerState(optimizer, partial(_named, models, policy))
    for name, given in schedulers.items():
        scheduler = getattr(given, "scheduler", given)
        if isinstance(scheduler, LRScheduler) and not any(scheduler.optimizer is optimizer for optimizer in own):
            raise UserError(
                f"{name} sets the learning rate of an optimizer that is not saved: pass it as `optimizer`, too; its "
                "state has the learning rate"
            )
        parts[name] = SchedulerState(scheduler) if isinstance(scheduler, LRScheduler) else given
    return parts


def _named(models: dict[str, nn.Module], policy: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that optimizers may hold: all of the models, and those of the policy, which may be masters."""
    for key, model in models.items():
        prefix = f"{key}." if len(models) > 1 else ""
        yield from ((prefix + name, parameter) for name, parameter in model.named_parameters())
    yield from policy.named_parameters() if policy is not None else ()


def _extra_parts(extra: Any) -> Parts:
    if extra is None:
        return {}
    if not isinstance(extra, dict):
        return {"extra": extra}
    if any(isinstance(value, Stateful | FolderState) for value in extra.values()):
        return extra
    return {"extra": DictState(extra)}


class DictState:
    """A dict of plain values as a part of a checkpoint; loading updates it in place."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def state_dict(self) -> dict[str, Any]:
        """Return the values."""
        return dict(self.values)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put the stored values into the dict."""
        self.values.clear()
        self.values.update(state)


def _plain(metrics: Any) -> tuple[dict[str, float], bool] | None:
    if metrics is None:
        return None
    values, valid = (metrics.metrics, metrics.valid) if isinstance(metrics, Evaluation) else (metrics, True)
    return {name: float(value) for name, value in values.items()}, valid
