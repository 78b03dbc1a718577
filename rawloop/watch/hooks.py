"""Hooks on the optimizers and the scaler of a foreign loop, and the one read from the device at each update."""

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rawloop.watch.recorder import Recorder, listening
from rawloop.watch.subject import Facts, Subject


@dataclass
class Hooks:
    """Sees updates, skips, scales and gradients, and writes them into the facts of the window.

    Args:
        subject: the objects under watch.
        recorder: tells lines of the user's code.
        facts: returns the facts of the current window.
        before: called before an update, with the weights not yet changed.
        after: called after an update, with whether it was applied.
    """

    subject: Subject
    recorder: Recorder
    facts: Callable[[], Facts]
    before: Callable[[], None]
    after: Callable[[bool], None]
    losses: list[tuple[Tensor, bool]] = field(default_factory=list)  # roots of backward passes, and whether scaled
    clipped: Tensor | None = None  # the norm that clip_grad_norm_ has returned, and
    clipped_scaled: bool = False  # whether it was that of scaled gradients
    skips_inside: bool | None = None  # whether a fused update is going to skip
    _total: int = 0  # backward passes
    _stepped: dict[int, int] = field(default_factory=dict)  # optimizer -> backward passes before its last step
    _scaling: bool = False  # scaler.scale was called since the last backward pass
    _in_scaler: bool = False
    _updated: bool = False  # inside scaler.step: the optimizer's own step has run
    _attempted: bool = True  # an optimizer was stepped since the last backward pass
    _applied: list[tuple[Any, weakref.ref[Tensor], int]] = field(default_factory=list)  # a gradient of the last update
    _versions: dict[int, int] = field(default_factory=dict)
    _skipped_lrs: list[Any] | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Keep the hooks inside the context."""
        with ExitStack() as stack:
            for optimizer in self.subject.optimizers:
                stack.callback(optimizer.register_step_pre_hook(self._before_step).remove)
                stack.callback(optimizer.register_step_post_hook(self._after_step).remove)
                stack.enter_context(wrapped(optimizer, "zero_grad", self._zero_grad))
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
        if facts.backwards == 0:
            facts.left_over = any(
                (grad := alive()) is not None and w.grad is grad and grad._version == v for w, alive, v in self._applied
            )
            facts.lr_moved = self._skipped_lrs is not None and self._skipped_lrs != self._lrs()
            self._applied, self._skipped_lrs = [], None
        scaled, self._scaling = self._scaling, False

        def after(succeeded: bool) -> None:
            if not succeeded:
                return
            facts.backwards += 1
            facts.scaled += scaled
            facts.zeroed = ""
            self._total += 1
            self._attempted = False
            self.losses += [(root.detach(), scaled) for root in roots]
            if scaled:
                self._versions = self._read_versions()

        return after

    def measure(self) -> tuple[float, float, float]:
        """Return (loss, norm of the gradients, loss scale), read from the device once; loss and norm are unscaled."""
        facts = self.facts()
        norm = total_norm([w.grad for _, w in self.subject.named() if w.grad is not None])
        optimizer_inf = [
            inf for o in self.subject.optimizers if isinstance(inf := getattr(o, "found_inf", None), Tensor)
        ]
        found = [norm, self._sum(True), self._sum(False), self._scale_tensor()]
        found += [self.clipped if self.clipped is not None else torch.tensor(-1.0), *optimizer_inf]
        device = norm.device
        got = torch.stack([t.detach().to(device, torch.float32).reshape(()) for t in found]).tolist()
        size, scaled, plain, scale, clipped, *infs = got
        self.skips_inside = any(infs) if infs else None
        now = scale if facts.scaled and not facts.unscaled else 1.0
        size = size / now
        if self.clipped is not None:
            before = clipped / (scale if self.clipped_scaled else 1.0)
            size = before if not before <= size else size
        loss = (scaled / scale if any(s for _, s in self.losses) else 0.0) + plain if self.losses else math.nan
        return loss, size, scale

    def clear(self) -> None:
        """Forget the window."""
        self.losses.clear()
        self.clipped = None
        self._versions = {}

    def _sum(self, scaled: bool) -> Tensor:
        chosen = [loss.float().sum() for loss, kind in self.losses if kind is scaled]
        return torch.stack([loss.to(chosen[0].device) for loss in chosen]).sum() if chosen else torch.zeros(())

    def _scale_tensor(self) -> Tensor:
        scaler = self.subject.scaler
        own = getattr(scaler, "_scale", None)
        if isinstance(own, Tensor):
            return own
        return torch.tensor(float(scaler.get_scale()) if hasattr(scaler, "get_scale") else 1.0)

    def _lrs(self) -> list[Any]:
        return [float(group["lr"]) for o in self.subject.optimizers for group in o.param_groups if "lr" in group]

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.recorder.pause()
        facts = self.facts()
        facts.optimizer, facts.step_line = self._name(optimizer), str(self.recorder.line())
        facts.through_scaler = self._in_scaler
        facts.idle = self._stepped.get(id(optimizer), 0) == self._total
        self._stepped[id(optimizer)] = self._total
        self._attempted = True
        self.before()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._updated = True
        if self.skips_inside:
            self._skipped_lrs = self._lrs()
            self.after(False)
            return
        held = ((w, w.grad) for group in optimizer.param_groups for w in group["params"] if w.grad is not None)
        self._applied = [(w, weakref.ref(grad), grad._version) for w, grad in islice(held, 2)]
        self.after(True)

    def _name(self, optimizer: Optimizer) -> str:
        name = type(optimizer).__name__
        number = next(n for n, own in enumerate(self.subject.optimizers, start=1) if own is optimizer)
        return name if len(self.subject.optimizers) == 1 else f"{name} ({number})"

    def _zero_grad(self, call: Callable[[], Any]) -> Any:
        facts, on = self.facts(), self.recorder.recording
        if facts.backwards and not self._attempted:
            facts.zeroed = str(self.recorder.line())
        self.recorder.pause()
        try:
            return call()
        finally:
            if on:
                self.recorder.resume()

    def _clip(self, *args: Any, **kwargs: Any) -> Callable[[bool, Any], None]:
        facts = self.facts()
        if facts.scaled and not facts.unscaled:
            facts.written = facts.written or str(self.recorder.line())

        def after(succeeded: bool, result: Any) -> None:
            if isinstance(result, Tensor):
                self.clipped, self.clipped_scaled = result, bool(facts.scaled and not facts.unscaled)

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
        self.recorder.pause()
        facts = self.facts()
        if facts.backwards and not self._attempted:
            facts.scale_moved = str(self.recorder.line())
        return call()

    def _read_versions(self) -> dict[int, int]:
        grads = [w.grad for _, w in self.subject.named() if w.grad is not None]
        return {id(grad): grad._version for grad in grads}


@contextmanager
def wrapped(thing: Any, name: str, around: Callable[[Callable[[], Any]], Any]) -> Iterator[None]:
    """Call `around(call)` in place of a method of one object; `call()` is the method itself."""
    original, own = getattr(thing, name), vars(thing).get(name)
    active = True

    def method(*args: Any, **kwargs: Any) -> Any:
        return around(lambda: original(*args, **kwargs)) if active else original(*args, **kwargs)

    setattr(thing, name, method)
    try:
        yield
    finally:
        active = False
        if vars(thing).get(name) is method:
            delattr(thing, name) if own is None else setattr(thing, name, own)


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
