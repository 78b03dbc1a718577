"""Hooks on the optimizers and the scaler of a foreign loop, and the one read from the device at each update."""

import math
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
from rawloop.watch.subject import Facts, StepRecord, Subject

PART = "the hooks on optimizers and scaler"


@dataclass
class Hooks:
    """Sees updates, skips, scales and gradients, and writes them into the facts of the window.

    Args:
        subject: the objects under watch.
        recorder: tells lines of the user's code.
        record: returns the current step, into whose facts the hooks write.
        before: called before an update, with the weights not yet changed.
        after: called after an update, with whether it was applied.
    """

    subject: Subject
    recorder: Recorder
    record: Callable[[], StepRecord]
    before: Callable[[], None]
    after: Callable[[bool], None]
    losses: list[tuple[Tensor, bool]] = field(default_factory=list)  # roots of backward passes, and whether scaled
    clipped: Tensor | None = None  # the norm that clip_grad_norm_ has returned, and
    clipped_scaled: bool = False  # whether it was that of scaled gradients
    clips_all: bool = False  # and whether it was that of all gradients
    skips_inside: bool | None = None  # whether a fused update is going to skip
    _total: int = 0  # backward passes
    _stepped: dict[int, int] = field(default_factory=dict)  # optimizer -> backward passes before its last step
    _scaling: bool = False  # scaler.scale was called since the last backward pass
    _in_scaler: bool = False
    _updated: bool = False  # inside scaler.step: the optimizer's own step has run
    _attempted: bool = True  # an optimizer was stepped since the last backward pass
    _applied: dict[int, list[tuple[Any, weakref.ref[Tensor], int]]] = field(default_factory=dict)  # by optimizer: two
    # gradients of its last update
    _added_to: dict[int, "weakref.ref[Tensor]"] = field(default_factory=dict)  # by optimizer: a gradient of its last
    # update to which a backward pass has added
    _versions: dict[int, int] = field(default_factory=dict)
    _skipped_lrs: list[Any] | None = None
    _clips: dict[Line, bool] = field(default_factory=dict)  # whether the clipping at a line is of all gradients

    def facts(self) -> Facts:
        """Return the facts of the current window."""
        return self.record().facts

    @property
    def guard(self) -> Guard:
        """Keeps errors of the hooks from the loop."""
        return self.subject.guard

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Keep the hooks inside the context."""
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

    def before_backward(self, roots: Sequence[Tensor]) -> Callable[[bool], None]:
        """Note a backward pass. Returns what is to be called after it."""
        facts = self.facts()
        kept = [(key, *one) for key, last in self._applied.items() for one in last if _is(one[0].grad, *one[1:])]
        if facts.backwards == 0:
            facts.lr_moved = self._skipped_lrs is not None and self._skipped_lrs != self._lrs()
            self._skipped_lrs = None
        scaled, self._scaling = self._scaling, False

        def after(succeeded: bool) -> None:
            if not succeeded:
                return
            facts.backwards += 1
            for key, w, alive, version in kept:
                grad = alive()
                if grad is not None and w.grad is grad and grad._version > version:
                    self._added_to[key] = alive
            facts.scaled += scaled
            facts.zeroed = ""
            self._total += 1
            self._attempted = False
            self.losses += [(root.detach(), scaled) for root in roots]
            if scaled:
                self._versions = self._read_versions()

        return after

    def measure(self) -> tuple[float, float, float]:
        """Return (loss, norm of the gradients, loss scale), read from the device once; loss and norm are unscaled.

        The norm is that of `clip_grad_norm_`, if on all probing steps the same line has clipped all gradients.
        """
        known = self.clipped is not None and self.clips_all and not self.record().probing
        found: dict[Any, Tensor] = {kind: part for kind in (True, False) if (part := self._sum(kind)) is not None}
        if not known:
            late = {id(w) for one in self._still_scaled() for group in one.param_groups for w in group["params"]}
            grads = [(id(w) in late, grad) for _, w in self.subject.named() if (grad := w.grad) is not None]
            found["norm"] = total_norm([grad for is_late, grad in grads if not is_late])
            if late:
                found["late"] = total_norm([grad for is_late, grad in grads if is_late])
        own = getattr(self.subject.scaler, "_scale", None)
        if isinstance(own, Tensor):
            found["scale"] = own
        if self.clipped is not None:
            found["clipped"] = self.clipped
        infs = [getattr(optimizer, "found_inf", None) for optimizer in self.subject.optimizers]
        found |= {n: inf for n, inf in enumerate(infs, start=2) if isinstance(inf, Tensor)}
        got = dict(zip(found, numbers([*found.values()]), strict=True))
        flags = [value for name, value in got.items() if type(name) is int]
        self.skips_inside = any(flags) if flags else None
        scale = got["scale"] if "scale" in got else self.subject.loss_scale()
        loss = got.get(True, 0.0) / scale + got.get(False, 0.0) if self.losses else math.nan
        return loss, self._norm(got.get("norm"), got.get("late", 0.0), got.get("clipped"), scale), scale

    def _norm(self, measured: float | None, late: float, clipped: float | None, scale: float) -> float:
        """Return the norm before clipping, unscaled."""
        facts = self.facts()
        before = None if clipped is None else clipped / (scale if self.clipped_scaled else 1.0)
        if measured is None:
            assert before is not None
            return before
        size = math.hypot(measured / (scale if facts.scaled and not facts.unscaled else 1.0), late / scale)
        return before if before is not None and not before <= size else size

    def _still_scaled(self) -> list[Optimizer]:
        """Return the optimizers whose gradients are scaled, although the scaler has unscaled those of another one."""
        states = getattr(self.subject.scaler, "_per_optimizer_states", None)
        if not states or not self.facts().unscaled:
            return []
        done = {key for key, state in states.items() if getattr(state.get("stage"), "name", "READY") != "READY"}
        return [optimizer for optimizer in self.subject.optimizers if id(optimizer) not in done]

    def scales(self, scale: float) -> dict[int, float]:
        """Return the scale left on the gradients of an optimizer, by its id, if it is not that of the others."""
        return {id(optimizer): scale for optimizer in self._still_scaled()}

    def clear(self) -> None:
        """Forget the window."""
        self.losses.clear()
        self.clipped = None
        self._versions = {}

    def _sum(self, scaled: bool) -> Tensor | None:
        chosen = [loss.float().sum() if loss.dim() else loss for loss, kind in self.losses if kind is scaled]
        if len(chosen) < 2:
            return chosen[0] if chosen else None
        return torch.stack([loss.to(chosen[0].device, torch.float32) for loss in chosen]).sum()

    def _lrs(self) -> list[Any]:
        return [float(group["lr"]) for o in self.subject.optimizers for group in o.param_groups if "lr" in group]

    @guarded(PART)
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Note a step and look, before the weights change. With a closure that is after its first call."""
        self.recorder.pause()
        facts = self.facts()
        facts.optimizer, facts.step_line = self._name(optimizer), str(self.recorder.line())
        facts.through_scaler = self._in_scaler
        facts.stepped.add(id(optimizer))
        added = self._added_to.pop(id(optimizer), None)
        facts.left_over |= added is not None and any(
            w.grad is not None and w.grad is added() for w, *_ in self._applied.get(id(optimizer), ())
        )
        self._attempted = True
        given = [*(args[:2] if args[:1] == (optimizer,) else args[:1]), kwargs.get("closure")]
        closure = next((one for one in given if callable(one)), None)
        if closure is not None:
            facts.idle = False
            self._stepped[id(optimizer)] = self._total
            once = self._closing(closure)
            return tuple(once if one is closure else one for one in args), {
                name: once if one is closure else one for name, one in kwargs.items()
            }
        facts.idle = self._is_idle(optimizer)
        self._stepped[id(optimizer)] = self._total
        self._look()
        return None

    def _closing(self, closure: Callable[[], Any]) -> Callable[[], Any]:
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
            self.facts().inside_backward = True  # the gradients of the other weights are not there yet
        else:
            self.before()

    def _is_idle(self, optimizer: Optimizer) -> bool:
        """Whether there is no gradient since the last step: neither a backward pass nor another tensor or write."""
        if self.recorder.in_backward or self._stepped.get(id(optimizer), 0) != self._total:
            return False
        last = self._applied.get(id(optimizer))
        held = [(w, w.grad) for group in optimizer.param_groups for w in group["params"] if w.grad is not None]
        if last is None:
            return not held
        return all(w.grad is None or _is(w.grad, alive, v) for w, alive, v in last)

    @guarded(PART)
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._updated = True
        if self.skips_inside:
            self._skipped_lrs = self._lrs()
            self.after(False)
            return
        held = ((w, w.grad) for group in optimizer.param_groups for w in group["params"] if w.grad is not None)
        self._applied[id(optimizer)] = [(w, weakref.ref(grad), grad._version) for w, grad in islice(held, 2)]
        self.after(True)

    def _name(self, optimizer: Optimizer) -> str:
        name = type(optimizer).__name__
        number = next(n for n, own in enumerate(self.subject.optimizers, start=1) if own is optimizer)
        return name if len(self.subject.optimizers) == 1 else f"{name} ({number})"

    def _zero_grad(self, key: int, call: Callable[[], Any]) -> Any:
        self._added_to.pop(key, None)
        facts = self.facts()
        if facts.backwards and not self._attempted:
            facts.zeroed = str(self.recorder.line())
        return self._unrecorded(call)

    def _unrecorded(self, call: Callable[[], Any]) -> Any:
        on = self.recorder.recording
        self.recorder.pause()
        try:
            return call()
        finally:
            if on:
                self.recorder.resume()

    def _clip(self, *args: Any, **kwargs: Any) -> Callable[[bool, Any], None]:
        facts, line = self.facts(), self.recorder.line()
        if facts.scaled and not facts.unscaled:
            facts.written = facts.written or str(line)
        before = self._read_versions() if self.record().probing else {}
        is_l2 = (kwargs["norm_type"] if "norm_type" in kwargs else args[2] if len(args) > 2 else 2) == 2

        def after(succeeded: bool, result: Any) -> None:
            if not isinstance(result, Tensor):
                return
            self.clipped, self.clipped_scaled = result, bool(facts.scaled and not facts.unscaled)
            if before:  # clipping writes to each gradient, whether it is too large or not
                now = self._read_versions()
                self._clips[line] = is_l2 and self._clips.get(line, True) and all(now[g] > v for g, v in before.items())
            self.clips_all = self._clips.get(line, False)

        return after

    def _scaler_scale(self, call: Callable[[], Any]) -> Any:
        self._scaling = True
        return call()

    def _scaler_unscale(self, call: Callable[[], Any]) -> Any:
        self.recorder.pause()
        facts = self.facts()
        if self._versions and self._versions != self._read_versions():
            facts.written = facts.written or "code that is not seen"
        result = call()
        facts.unscaled = True
        return result

    def _scaler_step(self, call: Callable[[], Any]) -> Any:
        self.recorder.pause()
        self._in_scaler, self._updated = True, False
        line = str(self.recorder.line())
        try:
            result = call()
        finally:
            self._in_scaler = False
        self._attempted = True
        if not self._updated:
            facts = self.facts()
            facts.step_line, facts.through_scaler = line, True
            self._skipped_lrs = self._lrs()
            self.before()
            self.after(False)
        return result

    def _scaler_update(self, call: Callable[[], Any]) -> Any:
        facts = self.facts()
        if facts.backwards and not self._attempted:
            facts.scale_moved = str(self.recorder.line())
        return self._unrecorded(call)

    def _read_versions(self) -> dict[int, int]:
        grads = [grad for _, w in self.subject.named() if (grad := w.grad) is not None]
        return {id(grad): grad._version for grad in grads}


def numbers(tensors: Sequence[Tensor]) -> list[float]:
    """Read tensors of one value: one by one from the host, else with one wait for the device."""
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return [*map(float, tensors)]
    device = next(tensor.device for tensor in tensors if tensor.device.type != "cpu")
    read: list[float] = torch.stack([t.detach().to(device, torch.float32).reshape(()) for t in tensors]).tolist()
    return read


def _is(grad: Tensor | None, alive: "weakref.ref[Tensor]", version: int) -> bool:
    """Whether a gradient is one that was seen, and has not been written since."""
    return grad is not None and alive() is grad and grad._version == version


def total_norm(grads: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of all gradients, in float32, as a tensor on the device of the first."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for grad in grads:
        grad = grad.coalesce().values() if grad.is_sparse else grad
        groups.setdefault((grad.device, grad.dtype), []).append(grad)
    if not groups:
        return torch.zeros(())
    norms: list[Tensor] = [
        torch.linalg.vector_norm(
            torch.stack(torch._foreach_norm(group, 2, dtype=torch.promote_types(d, torch.float32)))
        )
        for (_, d), group in groups.items()
    ]
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device, torch.float32) for norm in norms]))
    return total
