"""One forward and backward pass before DDP and the optimizer exist: an error there can still be mended by all ranks.

Later it cannot: a rank that fails in the middle of a pass leaves the others waiting in DDP's all-reduce.
"""

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rawloop.errors import TrainingError, UserError
from rawloop.precision.policy import PrecisionPolicy, connected
from rawloop.seed import preserved_rng

# What torch says of an operation that a device lacks for a dtype, or of two dtypes that do not fit each other.
LACKING = re.compile(
    r"not implemented for '(Half|BFloat16)'|(not supported|unsupported).*(half|float16)"
    r"|(half|float16|dtype).*not supported|expected scalar type|same dtype|dtypes match",
    re.IGNORECASE,
)


def preflight(policy: PrecisionPolicy, loss_of: Callable[[], Tensor]) -> list[str]:
    """Try one forward and backward pass on the prepared model, and change nothing by it. All ranks call this together.

    A mode in which the device lacks an operation is left for the next one of the chain.

    Args:
        policy: has prepared the model.
        loss_of: runs the model on some batch and returns a scalar loss; it is called once per mode that is tried.

    Returns:
        the trained weights that got no gradient on this rank, by name.

    Raises:
        UserError: no mode that is left can run the model.
        TrainingError: the loss hangs on no trained weight, on some rank.
    """
    while True:
        message, kind = _attempt(policy, loss_of)
        unused = [name for name, weight in policy.trained.weights.items() if weight.grad is None]
        if not kind and len(unused) == len(policy.trained.weights):
            message, kind = (
                "no trained weight got a gradient from the loss: all that it hangs on is frozen",
                "unconnected",
            )
        for weight in policy.trained.weights.values():
            weight.grad = None
        lacking, unconnected = policy.agree([kind == "lacking", kind == "unconnected"])
        if lacking:
            _next_mode(policy, message)
        elif unconnected:
            raise TrainingError(message if kind else "on another rank the loss is not connected to any trained weight")
        else:
            return unused


def _attempt(policy: PrecisionPolicy, loss_of: Callable[[], Tensor]) -> tuple[str, str]:
    """Run both passes; a message and `lacking` or `unconnected` if they fail. Buffers and random streams are put back.

    An error that says nothing of dtypes is none of ours, and is raised as it is.
    """
    assert policy.model is not None
    buffers: Sequence[tuple[Tensor, Tensor]] = [(buffer, buffer.clone()) for buffer in policy.model.buffers()]
    try:
        with preserved_rng():
            with policy.autocast():
                loss = loss_of()
            torch.autograd.backward(connected(loss).float())
    except TrainingError as error:
        return str(error), "unconnected"
    except (NotImplementedError, RuntimeError, TypeError) as error:
        if not LACKING.search(str(error)):
            raise
        return str(error).splitlines()[0], "lacking"
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
    return "", ""


def _next_mode(policy: PrecisionPolicy, message: str) -> None:
    name, choice = policy.name, policy.choice
    message = message or "on another rank"
    if policy.advance(f"{choice.hardware.name} cannot run the model in it: {message}"):
        return
    advice = f"name another mode ({choice.modes_that_work()}), or have some to go on in with precision.fallback"
    if name == "native_fp16" and policy.trained.dtype == torch.float32:
        advice = (
            "float32 weights fit beside FP16 ones only in layers that cast their input, as LoRA's do: set "
            "precision.trainable_dtype to fp16 (with masters), or use another mode"
        )
    raise UserError(
        f"precision.mode is '{name}', in which {choice.hardware.name} cannot run this model ({message}): {advice}"
    )
