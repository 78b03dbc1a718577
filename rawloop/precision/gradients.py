"""What the gradients of one window are, found out before anything is done with them, and what is wrong with them."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rawloop.errors import TrainingError, UserError
from rawloop.precision.masters import Trained
from rawloop.precision.scaler import GuardedGradScaler, LossScaler

SCALER_ERRORS = (ValueError, RuntimeError, AssertionError)  # all that torch's GradScaler raises


class Measured(NamedTuple):
    """The gradients' L2 norm, unscaled (-1 without any gradient), and what speaks against applying them."""

    norm: float
    loss_is_finite: bool = True
    refusal: str | None = None  # what torch's scaler raised


def measure(
    optimizers: Iterable[Optimizer],
    held: list[nn.Parameter],
    trained: Trained,
    scaler: LossScaler | None,
    loss: Tensor | None,
    every_gradient: bool,
) -> Measured:
    """Measure a window's gradients, and unscale them where torch's scaler does it.

    Args:
        optimizers: who will apply them.
        held: the trained parameters that they hold.
        trained: knows where backward has put the gradients.
        scaler: what the loss was multiplied by.
        loss: the sum of the window's losses, a scalar; None if nobody kept it.
        every_gradient: a trained weight without one is an error.

    Raises:
        TrainingError: see `every_gradient`.
        UserError: the scaler has not seen the loss.
    """
    gradients = [gradient for p in held if (gradient := trained.gradient(p)) is not None]
    if not gradients:
        return Measured(-1.0)
    if every_gradient and len(gradients) < len(held):
        raise TrainingError(missing_gradients(held, trained))
    if scaler and not scaler.window_open:
        raise UserError(
            "the gradients were not made by policy.backward(loss), so that nobody knows their scale: replace "
            "loss.backward() by policy.backward(loss)"
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
    measured, total = torch.stack([norm, norm if loss is None else loss.to(norm.device)]).tolist()
    return Measured(measured / scale, loss is None or math.isfinite(total))


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


def connected(loss: Tensor) -> Tensor:
    """The loss itself.

    Raises:
        TrainingError: it hangs on no trainable weight.
    """
    if loss.grad_fn is None:
        raise TrainingError(
            "the loss is not connected to any trainable weight (it has no grad_fn): "
            "it was detached, made anew, or all weights that it depends on are frozen"
        )
    return loss


def global_norm(gradients: list[Tensor]) -> Tensor:
    """L2 norm over all gradients together, a float32 scalar on their device: in 16 bits it would overflow."""
    norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total
