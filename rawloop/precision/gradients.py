"""What the gradients of one window are, found out before anything is done with them, and what is wrong with them."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rawloop.errors import TrainingError, UserError
from rawloop.precision.masters import Trained
from rawloop.precision.scaler import GuardedGradScaler, LossScaler

SCALER_ERRORS = (ValueError, RuntimeError, AssertionError)  # all that torch's GradScaler raises


class Measured(NamedTuple):
    """The gradients' L2 norm, unscaled (-1 without any gradient), what else may not be finite, and a refusal.

    `loss` is the sum over micro-batches, `buffers` 0.0 or NaN: not finite if one of them is not.
    """

    norm: float
    loss: float = 0.0
    buffers: float = 0.0
    refusal: str | None = None  # what torch's scaler raised


def measure(
    optimizers: Iterable[Optimizer],
    held: list[nn.Parameter],
    trained: Trained,
    scaler: LossScaler | None,
    loss: Tensor | None,
    every_gradient: bool,
    buffers: Sequence[Tensor] = (),
) -> Measured:
    """Measure a window's gradients, and unscale them where torch's scaler does it.

    Args:
        optimizers: who will apply them.
        held: the trained parameters that they hold.
        trained: knows where backward has put the gradients.
        scaler: what the loss was multiplied by.
        loss: the sum of the window's losses, a scalar; None if `policy.backward` has seen none.
        every_gradient: a trained weight without one is an error.
        buffers: floats that must be finite as well.

    Raises:
        TrainingError: see `every_gradient`.
        UserError: nobody has seen the loss.
    """
    gradients = [gradient for p in held if (gradient := trained.gradient(p)) is not None]
    if not gradients:
        return Measured(-1.0)
    if every_gradient and len(gradients) < len(held):
        raise TrainingError(missing_gradients(held, trained))
    if loss is None:
        raise UserError(
            "the gradients were not made by policy.backward(loss), so that nobody knows their scale, or whether the "
            "loss was finite: replace loss.backward() by policy.backward(loss)"
        )
    scale = scaler.scale if scaler else 1.0
    if isinstance(scaler, GuardedGradScaler):
        scale = 1.0
        try:
            for optimizer in optimizers:
                scaler.unscale(optimizer)
        except SCALER_ERRORS as error:
            return Measured(math.nan, refusal=f"{type(error).__name__}: {error}")
    norm = global_norm(gradients)
    # The one wait for the device in a step: what is applied must be known.
    numbers = [norm, loss.to(norm.device)]
    if buffers:
        numbers.append(torch.cat([b.flatten().to(norm.device, torch.float32) for b in buffers]).mul(0).sum())
    measured, *others = torch.stack(numbers).tolist()
    return Measured(measured / scale, *others)


def missing_gradients(held: Iterable[nn.Parameter], trained: Trained) -> str:
    """What to say of it. The other ranks are not asked first: they may be waiting for this one in backward."""
    missing = {id(p) for p in held if trained.gradient(p) is None}
    names = [name for name, parameter in trained.named_parameters() if id(parameter) in missing]
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (
        f"{len(names)} trained weights got no gradient in this step ({', '.join(names[:5])}{more}), and "
        "ddp.find_unused_parameters is off, so that the ranks would drift apart or wait for each other for ever: "
        "nothing was applied. Set ddp.find_unused_parameters to true, or freeze these weights"
    )


def connected(loss: Any) -> Tensor:
    """The loss itself.

    Raises:
        UserError: it is no tensor of one number.
        TrainingError: it hangs on no trainable weight.
    """
    if not isinstance(loss, Tensor):
        more = ": a model returns none where it got no labels, or under a name that it swallows" if loss is None else ""
        raise UserError(f"the loss is {'None' if loss is None else f'a {type(loss).__name__}'}, not a tensor{more}")
    if loss.numel() != 1:
        raise UserError(f"the loss has shape {tuple(loss.shape)}: backward takes one number, a sum or a mean")
    if loss.grad_fn is None:
        why = "it was detached, computed under torch.no_grad, or all weights that it depends on are frozen"
        if loss.requires_grad:
            why = (
                "it is a tensor made anew, such as torch.tensor(value, requires_grad=True), and not what the model gave"
            )
        raise TrainingError(f"the loss is not connected to any trainable weight (it has no grad_fn): {why}")
    return loss


def leaves_of(loss: Tensor) -> list[Tensor]:
    """The tensors that get a gradient from a loss, weights or not."""
    seen, nodes, leaves = set(), [loss.grad_fn], []
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        if hasattr(node, "variable"):
            leaves.append(node.variable)
    return leaves


def global_norm(gradients: list[Tensor]) -> Tensor:
    """L2 norm over all gradients together, a float32 scalar on their device: in 16 bits it would overflow."""
    norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


def found_out(model: nn.Module, what: str, moved: Sequence[Tensor], fp16: bool) -> str:
    """Where numbers that are not finite come from, as far as can be seen, and what to do. It waits for the device.

    Args:
        model: what was trained.
        what: is not finite: `loss`, `norm` (of the gradients) or `buffers`.
        moved: buffers that this window has moved: they say nothing of what was there before.
        fp16: whether it computes in FP16.
    """
    fresh = {id(buffer) for buffer in moved}
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if id(buffer) not in fresh]
    # of buffers NaN alone: the -inf of a mask is healthy
    spoilt = [name for name, p in model.named_parameters() if not bool(torch.isfinite(p.detach()).all())]
    spoilt += [name for name, buffer in buffers if bool(torch.isnan(buffer).any())]
    if spoilt:
        return (
            f"{len(spoilt)} of the model's weights and buffers are not finite, first {spoilt[0]}: no loss can be "
            "finite with them. Begin with finite ones, of an earlier checkpoint, or of the base model fetched again"
        )
    samples = "look at the samples that the last skips name (events.jsonl)"
    if what == "norm" and fp16:
        advice = "take a lower learning rate, or a mode of more range than FP16 (bf16, fp32)"
    elif what == "norm":
        advice = f"its backward pass makes them (the root of zero): {samples} under torch.autograd.detect_anomaly()"
    else:
        more = ", or take a mode of more range than FP16 (bf16, fp32)" if fp16 else ""
        advice = f"{samples} for what is not finite or too large in them{more}"
        names = [name for name, b in model.named_buffers() if id(b) in fresh and not bool(b.isfinite().all())]
        if what == "buffers" and names:
            advice = f"if the model came with {names[0]} so, begin with another one; else {advice}"
    healthy = {"loss": "weights are finite, its losses", "norm": "weights and losses are finite, the gradients"}
    return f"The model's {healthy.get(what, 'weights and losses are finite, the buffers that move')} are not: {advice}"
