"""Hooks on the optimizers and the scaler of a foreign loop: which calls it makes, and in which order."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rawloop.watch.guard import Guard, guarded
from rawloop.watch.listening import listening, wrapped
from rawloop.watch.marks import Line
from rawloop.watch.recorder import Recorder
from rawloop.watch.scalars import Scalars
from rawloop.watch.subject import Facts, StepRecord, Subject

PART = "the hooks on optimizers and scaler"
Call = Callable[[], Any]


@dataclass
class Hooks:
    """Sees backward passes, updates and calls of the scaler, and writes them into the facts of the window.

    Args:
        subject: the objects under watch.
        recorder: tells lines of the user's code.
        scalars: collects losses and norms.
        record: returns the current step, into whose facts the hooks write.
        before: called before an update, with the weights not yet changed.
        after: called after an update, with whether it was applied.
    """

    subject: Subject
    recorder: Recorder
    scalars: Scalars
    record: Callable[[], StepRecord]
    before: Callable[[], None]
    after: Callable[[bool], None]
    _backwards: int = 0  # in all
    _stepped: dict[int, int] = field(default_factory=dict)  # optimizer -> backward passes before its last step
    _scaling: bool = False  # scaler.scale was called since the last backward pass
    _in_scaler: bool = False
    _updated: bool = False  # inside scaler.step: the optimizer's own step has run
    _attempted: bool = True  # an optimizer was stepped since the last backward pass
    _applied: dict[int, list["_Gradient"]] = field(default_factory=dict)  # two of each optimizer's last update
    _added_to: dict[int, "_Gradient"] = field(default_factory=dict)  # of an optimizer's last update, to which a
    # backward pass has added
    _versions: dict[int, int] = field(default_factory=dict)  # of scaled gradients after a backward pass, in a look
    _clips: dict[Line, bool] = field(default_factory=dict)  # whether the clipping at a line is of all gradients

    @property
    def facts(self) -> Facts:
        """The facts of the current window."""
        return self.record().facts

    @property
    def guard(self) -> Guard:
        """Keeps errors of the hooks from the loop."""
        return self.subject.guard

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Keep the hooks inside the context."""
        self.subject.note_writes()
        with ExitStack() as stack:
            for optimizer in self.subject.optimizers:
                before: Any = self._before_step
                stack.callback(optimizer.register_step_pre_hook(before).remove)
                stack.callback(optimizer.register_step_post_hook(self._after_step).remove)
                stack.enter_context(wrapped(optimizer, "zero_grad", partial(self._zero_grad, id(optimizer))))
            for name in ("scale", "unscale_", "step", "update"):
                if hasattr(self.subject.scaler, name):
                    stack.enter_context(wrapped(self.subject.scaler, name, getattr(self, f"_scaler_{name.strip('_')}")))
            yield

    @contextmanager
    def clipping(self) -> Iterator[None]:
        """See `torch.nn.utils.clip_grad_norm_` inside the context."""
        with listening(torch.nn.utils, "clip_grad_norm_", self._clip):
            yield

    def clear(self) -> None:
        """Forget the window."""
        self.scalars.clear()
        self._versions = {}

    def before_backward(self, roots: Sequence[Tensor]) -> Callable[[bool], None]:
        """Note a backward pass. Returns what is to be called after it."""
        facts = self.facts
        kept = [(key, one) for key, last in self._applied.items() for one in last if one.is_same()]
        scaled, self._scaling = self._scaling, False

        def after(succeeded: bool) -> None:
            if not succeeded:
                return
            facts.backwards += 1
            facts.scaled += scaled
            facts.zeroed = None
            self._added_to |= {key: one for key, one in kept if one.is_there() and not one.is_same()}
            self._backwards += 1
            self._attempted = False
            self.scalars.losses += [(root.detach(), scaled) for root in roots]
            self._versions = self._read_versions() if scaled and self.record().probing else {}

        return after

    @guarded(PART)
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Note a step and look, before the weights change. With a closure that is after its first call."""
        self.recorder.pause()
        facts, key = self.facts, id(optimizer)
        facts.optimizer, facts.step_line = self._name(optimizer), self.recorder.line()
        facts.through_scaler = self._in_scaler
        facts.stepped.add(key)
        added = self._added_to.pop(key, None)
        facts.left_over |= added is not None and added.is_there()
        self._attempted = True
        given = [*(args[:2] if args[:1] == (optimizer,) else args[:1]), kwargs.get("closure")]
        closure = next((one for one in given if callable(one)), None)
        facts.idle = closure is None and self._is_idle(optimizer)
        self._stepped[key] = self._backwards
        if closure is None:
            self._look()
            return None
        once = self._closing(closure)
        named = {name: once if one is closure else one for name, one in kwargs.items()}
        return tuple(once if one is closure else one for one in args), named

    def _closing(self, closure: Call) -> Call:
        looked = False

        def call() -> Any:
            nonlocal looked
            result = closure()
            if not looked:
                looked = True
                self.recorder.pause()
                self._look()
            return result

        return call

    @guarded(PART)
    def _look(self) -> None:
        if self.recorder.in_backward:
            self.facts.inside_backward = True  # the gradients of the other weights are not there yet
        else:
            self.before()

    def _is_idle(self, optimizer: Optimizer) -> bool:
        """Whether there is no gradient since the last step: neither a backward pass nor another tensor or write."""
        if self.recorder.in_backward or self._stepped.get(id(optimizer), 0) != self._backwards:
            return False
        if (last := self._applied.get(id(optimizer))) is not None:
            return all(one.weight.grad is None or one.is_same() for one in last)
        return all(w.grad is None for group in optimizer.param_groups for w in group["params"])

    @guarded(PART)
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._updated = True
        if not self.scalars.skips_inside:
            held = ((w, w.grad) for group in optimizer.param_groups for w in group["params"] if w.grad is not None)
            self._applied[id(optimizer)] = [_Gradient(w, weakref.ref(g), g._version) for w, g in islice(held, 2)]
        self.subject.note_writes()
        self.after(not self.scalars.skips_inside)

    def _name(self, optimizer: Optimizer) -> str:
        name = type(optimizer).__name__
        number = next(n for n, own in enumerate(self.subject.optimizers, start=1) if own is optimizer)
        return name if len(self.subject.optimizers) == 1 else f"{name} ({number})"

    def _zero_grad(self, key: int, call: Call) -> Any:
        self._added_to.pop(key, None)
        if self.facts.backwards and not self._attempted:
            self.facts.zeroed = self.recorder.line()
        return self._unrecorded(call)

    def _unrecorded(self, call: Call) -> Any:
        on = self.recorder.recording
        self.recorder.pause()
        try:
            return call()
        finally:
            if on:
                self.recorder.resume()

    @guarded(PART)
    def _clip(self, *args: Any, **kwargs: Any) -> Callable[[bool, Any], None]:
        facts, line, scalars = self.facts, self.recorder.line(), self.scalars
        if facts.is_scaled:
            facts.written = facts.written or line
        before = self._read_versions() if self.record().probing else {}
        is_l2 = (kwargs["norm_type"] if "norm_type" in kwargs else args[2] if len(args) > 2 else 2) == 2

        def after(succeeded: bool, result: Any) -> None:
            if not isinstance(result, Tensor):
                return
            scalars.clipped, scalars.clipped_scaled = result, facts.is_scaled
            if before:  # clipping writes to each gradient, whether it is too large or not
                now = self._read_versions()
                self._clips[line] = is_l2 and self._clips.get(line, True) and all(now[g] > v for g, v in before.items())
            scalars.clips_all = self._clips.get(line, False)

        return after

    def _scaler_scale(self, call: Call) -> Any:
        self._scaling = True
        return call()

    def _scaler_unscale(self, call: Call) -> Any:
        self.recorder.pause()
        facts = self.facts
        if self._versions and self._versions != self._read_versions():
            facts.written = facts.written or Line()
        result = call()
        facts.unscaled = True
        return result

    def _scaler_step(self, call: Call) -> Any:
        self.recorder.pause()
        self._in_scaler, self._updated = True, False
        line = self.recorder.line()
        try:
            result = call()
        finally:
            self._in_scaler = False
        self._attempted = True
        if not self._updated:
            self.facts.step_line, self.facts.through_scaler = line, True
            self.before()
            self.after(False)
        return result

    def _scaler_update(self, call: Call) -> Any:
        if self.facts.backwards and not self._attempted:
            self.facts.scale_moved = self.recorder.line()
        return self._unrecorded(call)

    def _read_versions(self) -> dict[int, int]:
        return {id(grad): grad._version for _, w in self.subject.named() if (grad := w.grad) is not None}


@dataclass
class _Gradient:
    """A weight, and the gradient of its last update."""

    weight: Tensor
    grad: "weakref.ref[Tensor]"
    version: int

    def is_there(self) -> bool:
        """Whether the weight has the gradient still."""
        return self.weight.grad is not None and self.weight.grad is self.grad()

    def is_same(self) -> bool:
        """Whether it has, and nothing was written to it since."""
        return self.is_there() and self.weight.grad._version == self.version  # type: ignore[union-attr]
