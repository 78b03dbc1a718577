"""The gradients of an accumulation window: who made them, whether they are finite, and their norm."""

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from rawloop.errors import TrainingError, UserError, first_few
from rawloop.precision.masters import TrainedWeights, held_by
from rawloop.precision.scaler import LossScaler
from rawloop.sharding import norm_over_ranks, parts_of

ELSEWHERE = "another rank objected to the update"
SCALER_ERRORS = (ValueError, RuntimeError, AssertionError)  # all that torch's GradScaler raises


class StepResult(NamedTuple):
    """The outcome of one optimizer step. `grad_norm` is the global L2 norm before clipping.

    `fell_back` is set, for example to `amp_fp16 -> bf16`, if the policy has switched the mode. Then wrap the model in
    DDP again: weights may have another dtype. `loss` is the sum of this rank's losses, `scale` the loss scale.
    `objected`: the numbers were finite, and the observer of a rank has objected to the update.
    """

    applied: bool
    grad_norm: float
    skipped_because: str | None = None
    fell_back: str | None = None
    loss: float = math.nan
    scale: float = 1.0
    objected: bool = False


class Observer(Protocol):
    """Sees the gradients of a window after they are measured, before they are applied or dropped."""

    def judge(self, found: "Measured") -> str | None:
        """Return why a finite update is not to be applied, or None. If one rank has a reason, no rank applies it."""

    def look(self, found: "Measured", result: StepResult, *, last: bool) -> None:
        """Look at the gradients, which are still multiplied by `found.scale`. The ranks have agreed on the result.

        `last`: the policy is about to leave this mode. It calls no collective.
        """


class Window:
    """The backward passes since the last update, and the checks of their gradients."""

    def __init__(self, trained: TrainedWeights) -> None:
        self.trained = trained
        self.loss: Tensor | None = None  # the sum of all losses, which is not finite if one of them is not
        self.scale = 1.0
        self.closed = False  # an optimizer was stepped; others may follow, until the next backward pass
        self.dropped: str | None = None  # why its gradients are gone
        self.unscaled: dict[int, Tensor] = {}  # id of an optimizer -> norm of its gradients at `unscale`
        self._local: set[int] = set()  # ids of weights with gradients of this rank alone
        self._versions: dict[int, tuple[int, int]] = {}

    def add(self, loss: Tensor, scale: float, wrappers: Iterable[Any]) -> None:
        """Record a backward pass.

        Args:
            loss: the unscaled loss, a scalar.
            scale: the loss scale.
            wrappers: the DDP modules over trained weights.
        """
        self.loss = loss if self.loss is None else self.loss + loss
        self.scale = scale
        # `no_sync` and accelerate clear the first flag; the forward pass copies it into the second.
        unsynced = [d for d in wrappers if not (d.require_backward_grad_sync or d.require_forward_param_sync)]
        self._local = {id(weight) for ddp in unsynced for weight in ddp.parameters()}
        self.record_versions()

    def record_versions(self, only_views: bool = False) -> None:
        """Record how often each scaled gradient was written, so `check` sees writes by others.

        Views, as in a bucket of DDP, share one count. Call this with `only_views` after a write of the policy to one
        optimizer's gradients, which has increased the count of the others.
        """
        if self.scale != 1.0:
            given = [(id(weight), weight.grad) for weight in self.trained.weights.values() if weight.grad is not None]
            kept = self._versions if only_views else {}
            found = {key: (id(grad), grad._version) for key, grad in given if grad._is_view() or not only_views}
            self._versions = kept | found

    def check(self, optimizers: Sequence[Optimizer], held: Iterable[nn.Parameter]) -> None:
        """Raise a UserError if gradients do not come from `policy.backward`, or must not be applied."""
        if self.loss is None:
            raise UserError(
                "the gradients do not come from policy.backward(loss), so their scale is unknown, and whether the loss "
                "was finite: replace loss.backward() by policy.backward(loss)"
            )
        states = [getattr(optimizer, "gradient_state", None) for optimizer in optimizers]  # of accelerate's wrapper
        if not all(getattr(state, "sync_gradients", True) for state in states):
            raise UserError(
                "accelerate would skip this step: under accumulate() its optimizers step after the last "
                "micro-batch only; call policy.step(optimizer) there only: "
                "`if accelerator.sync_gradients: policy.step(optimizer)`"
            )
        weights = [self.trained.weight_of(p) for p in held]
        if self._local.intersection(map(id, weights)):
            raise UserError(
                "the gradients were not averaged over the ranks: the last policy.backward ran under DDP's no_sync, as "
                "in accelerate's accumulate(), and the ranks would differ; call policy.step(optimizer) after "
                "the last micro-batch only: `if accelerator.sync_gradients: policy.step(optimizer)`"
            )
        if self.scale == 1.0 or any(id(optimizer) in self.unscaled for optimizer in optimizers):
            return
        grads = [(weight, weight.grad) for weight in weights if weight.grad is not None]
        if self.unscaled:  # the user may have written these, and with them the count of all views in their bucket
            grads = [(weight, grad) for weight, grad in grads if not grad._is_view()]
        if any(self._versions.get(id(w)) != (id(grad), grad._version) for w, grad in grads):
            raise UserError(
                f"the gradients were changed between policy.backward and policy.step, while they are multiplied by "
                f"the loss scale {self.scale:g}: remove clip_grad_norm_ or clip_grad_value_ there and use "
                "policy.step(optimizer, max_norm=...), or call policy.unscale(optimizer) before it; a second "
                "loss.backward() must be policy.backward(loss)"
            )

    def refuse_foreign_step(self, optimizer: Optimizer) -> None:
        """Raise a UserError if the loop calls `optimizer.step()` itself while gradients wait for `policy.step`."""
        trained = {id(p) for name, held in self.trained.named_parameters() for p in (held, self.trained.weights[name])}
        held = [p for p in held_by([optimizer]) if id(p) in trained]
        waiting = not self.closed or any(p.grad is not None for p in held)
        if held and waiting and self.loss is not None:
            raise UserError(
                "optimizer.step() was called after policy.backward(loss); only policy.step(optimizer, max_norm) "
                "unscales, clips and checks the gradients: remove the line optimizer.step()"
            )


class Measured(NamedTuple):
    """The unscaled L2 norm of the gradients (-1 if there are none), and the other values that must be finite.

    `loss` is the sum over micro-batches. `buffers` is 0.0, or NaN if one of them is not finite. The gradients are still
    multiplied by `scale`. `refusal` is the error of torch's scaler.
    """

    norm: float
    loss: float = 0.0
    buffers: float = 0.0
    scale: float = 1.0
    refusal: str | None = None

    @property
    def finite(self) -> bool:
        """Whether there are gradients, and all numbers are finite."""
        return self.norm >= 0 and math.isfinite(self.norm + self.loss + self.buffers)


def watch_steps(policy: Any) -> None:
    """Check every `optimizer.step()` of this process against a policy, as long as the policy exists."""
    _watching().add(policy)


@lru_cache(maxsize=1)
def _watching() -> WeakSet[Any]:
    """Register one hook for all policies of the process, and return the set of these policies."""
    policies: WeakSet[Any] = WeakSet()

    # A hook per policy would be removed when the policy is deleted, perhaps while torch iterates over its hooks.
    def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for policy in list(policies):
            if not policy.stepping:
                policy.window.refuse_foreign_step(optimizer)

    register_optimizer_step_pre_hook(before_step)
    return policies


def measure(
    optimizers: Sequence[Optimizer],
    held: list[nn.Parameter],
    window: Window,
    scaler: LossScaler | None,
    every_gradient: bool,
    buffers: Sequence[Tensor] = (),
) -> Measured:
    """Measure a window's gradients, and unscale them where torch's scaler does it.

    Args:
        optimizers: the optimizers to step.
        held: the trained parameters that they hold.
        window: the backward passes.
        scaler: the loss scaler.
        every_gradient: raise an error if a trained weight has no gradient.
        buffers: float buffers that must be finite too.

    Raises:
        TrainingError: a weight has no gradient, and `every_gradient` is set.
        UserError: see `Window.check`.
    """
    trained = window.trained
    gradients = [gradient for p in held if (gradient := trained.weight_of(p).grad) is not None]
    if not gradients:
        return Measured(-1.0)
    if every_gradient and len(gradients) < len(held):
        raise TrainingError(missing_gradients(held, trained))
    window.check(optimizers, held)
    assert window.loss is not None
    unscaled = any(id(optimizer) in window.unscaled for optimizer in optimizers)
    try:
        scale = scaler.unscale(optimizers, window.scale) if scaler and not unscaled else 1.0
    except SCALER_ERRORS as error:
        return Measured(math.nan, refusal=f"{type(error).__name__}: {error}")
    norm = global_norm(gradients)
    for optimizer in optimizers:
        if id(optimizer) in window.unscaled:  # clipping by value since then may have hidden inf
            norm = norm + 0.0 * window.unscaled[id(optimizer)]
    # The only wait for the device in a step: the host must know whether to apply the update.
    numbers = [norm, window.loss.to(norm.device)]
    if buffers:
        numbers.append(torch.cat([b.flatten().to(norm.device, torch.float32) for b in buffers]).mul(0).sum())
    scaled_norm, loss, *moved = torch.stack(numbers).tolist()
    return Measured(scaled_norm / scale, loss, sum(moved), scale)


def missing_gradients(held: Iterable[nn.Parameter], trained: TrainedWeights) -> str:
    """Return the error message about weights without a gradient.

    This is raised without an agreement: the other ranks may be waiting for this one in backward.
    """
    missing = {id(p) for p in held if trained.weight_of(p).grad is None}
    names = [name for name, parameter in trained.named_parameters() if id(parameter) in missing]
    return (
        f"{len(names)} trained weights got no gradient in this step ({first_few(names)}), and "
        "ddp.find_unused_parameters is off, so the ranks would drift apart or wait for each other forever: "
        "nothing was applied. Set ddp.find_unused_parameters to true, or freeze these weights"
    )


def connected(loss: Any) -> Tensor:
    """Check the loss, and return it.

    Raises:
        UserError: it is not a tensor with one number.
        TrainingError: it depends on no trainable weight.
    """
    if not isinstance(loss, Tensor):
        more = ": a model returns None without labels, or with labels under an unknown name" if loss is None else ""
        raise UserError(f"the loss is {'None' if loss is None else f'a {type(loss).__name__}'}, not a tensor{more}")
    if loss.numel() != 1:
        raise UserError(f"the loss has shape {tuple(loss.shape)}: backward takes one number, a sum or a mean")
    if loss.grad_fn is None:
        why = "it was detached, computed under torch.no_grad, or all weights that it depends on are frozen"
        if loss.requires_grad:
            why = "it is a new tensor, such as torch.tensor(value, requires_grad=True), and not the model's output"
        raise TrainingError(f"the loss is not connected to any trainable weight (it has no grad_fn): {why}")
    return loss


def global_norm(gradients: list[Tensor]) -> Tensor:
    """Return the L2 norm over all gradients, a float32 scalar on their device: in 16 bits it would overflow.

    If they are sharded, it is the norm over all ranks, which call this together.
    """
    norms = torch._foreach_norm(parts_of(gradients), 2, dtype=torch.float32)
    return norm_over_ranks(torch.linalg.vector_norm(torch.stack(norms)), gradients)


def drop_scaler_marks(optimizers: Iterable[Optimizer]) -> None:
    """Delete the attributes that a scaler leaves on a fused optimizer if a step fails.

    A stale `found_inf` of 1 would turn every later step of the optimizer into a silent no-op.
    """
    for optimizer in optimizers:
        for name in ("grad_scale", "found_inf"):
            optimizer.__dict__.pop(name, None)
