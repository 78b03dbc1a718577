"""One forward and backward pass before DDP and the optimizer exist: an error there can still be mended by all ranks.

Later it cannot: a rank that fails in the middle of a pass leaves the others waiting in DDP's all-reduce.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rawloop.buffers import Moves, Trace, untouched
from rawloop.errors import RawloopError, TrainingError, UserError
from rawloop.precision.gradients import connected
from rawloop.precision.policy import PrecisionPolicy

# Errors of torch and of kernels about an operation that a device lacks for a dtype, or about dtypes that do not match.
LACKING = re.compile(
    r"not implemented for '(Half|BFloat16)'|(not supported|unsupported|undefined type).*(half|float16)"
    r"|(half|float16|dtype|data type).*not supported|expected scalar type|same dtype|dtypes match|mixed dtype"
    r"|dtype.*does not match|type \(.*\) should be the same|(CUBLAS|CUDNN)_STATUS_NOT_SUPPORTED"
    r"|only supports?\b.*(fp16|bf16|half|float16)|(fp16|bf16|half|float16).*only supported",
    re.IGNORECASE,
)


class Trial(NamedTuple):
    """What one pass has shown: the trained weights that got no gradient on this rank, by name, and what it moves."""

    unused: list[str]
    moves: Moves


def preflight(policy: PrecisionPolicy, loss_of: Callable[[], Tensor]) -> Trial:
    """Try one forward and backward pass on the prepared model, and change nothing by it. All ranks call this together.

    A mode in which the device lacks an operation is left for the next one of the chain.

    Args:
        policy: has prepared the model.
        loss_of: runs the model on some batch and returns a scalar loss; it is called once per mode that is tried, and
            again if it moves buffers that no file holds.

    Raises:
        UserError: no mode that is left can run the model.
        TrainingError: the loss hangs on no trained weight, on some rank.
        RawloopError: another rank failed, for a reason that it gives. An error of this rank that says nothing of
            dtypes (memory, data) is raised as it is.
    """
    while True:
        error, trial = _attempt(policy, loss_of)
        unconnected, lacks = isinstance(error, TrainingError), error is not None and is_lacking(error)
        lacking, unconnected_somewhere, failed = policy.world.any(
            [lacks, unconnected, error is not None and not lacks and not unconnected]
        )
        if failed:
            raise error or _quiet(RawloopError("another rank failed in its first pass, for a reason that it gives"))
        if lacking:
            _next_mode(policy, error)
            error = None  # its frames hold the graph of the pass
        elif unconnected_somewhere:
            raise error or TrainingError("on another rank the loss is not connected to any trained weight")
        else:
            return trial


def is_lacking(error: Exception) -> bool:
    """Whether an error of a pass says that dtypes do not match, or that the device lacks an operation for one."""
    kinds = NotImplementedError | RuntimeError | TypeError | ValueError
    return isinstance(error, kinds) and bool(LACKING.search(str(error)))


def _quiet(error: RawloopError) -> RawloopError:
    error.is_reporter = False  # the rank that failed has more to say
    return error


def _attempt(policy: PrecisionPolicy, loss_of: Callable[[], Tensor]) -> tuple[Exception | None, Trial]:
    """Run both passes, and return the error if they fail. Every error is caught: the ranks must agree on it first."""
    assert policy.model is not None
    trial = Trial([], Moves([], {}, [], []))
    try:
        with untouched(policy.model) as trace:
            with policy.autocast():
                loss = loss_of()
            forward = Trace(policy.model)
            torch.autograd.backward(connected(loss).float())
            unused = [name for name, weight in policy.trained.weights.items() if weight.grad is None]
            twice = any(moved for _, _, moved in forward.written().values())
            trial = Trial(unused, _moves(policy, loss_of, trace)._replace(twice=twice))
        if len(unused) == len(policy.trained.weights):
            return TrainingError(_unconnected(_leaves_of(loss))), trial
    except Exception as error:
        return error, trial
    return None, trial


def _moves(policy: PrecisionPolicy, loss_of: Callable[[], Tensor], trace: Trace) -> Moves:
    """What the pass has moved. Where no file holds it, a second pass shows whether it follows from the batch alone."""
    assert policy.model is not None
    attributes, written = trace.moved_attributes(), trace.written()
    refused = {name: why for name, (_, why, moved) in written.items() if moved and why is not None}
    if any(place.key in place.module._non_persistent_buffers_set for place, _, _ in written.values()):
        again = Trace(policy.model)
        with torch.no_grad(), policy.autocast():
            loss_of()
        moving = {name for name, (_, _, moved) in again.written().items() if moved}
        refused = {
            name: why
            for name, why in refused.items()
            if name in moving or written[name][0].key not in written[name][0].module._non_persistent_buffers_set
        }
    held = [name for name, (_, why, _) in written.items() if why is None]
    return Moves(held, refused, [name for name in written if name not in held], attributes)


def _leaves_of(loss: Tensor) -> list[Tensor]:
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


def _unconnected(leaves: list[Tensor]) -> str:
    """What to say of a loss from which no trained weight got a gradient, by the tensors that did."""
    if not leaves:
        return "no trained weight got a gradient from the loss: all that it hangs on is frozen"
    return (
        f"no trained weight got a gradient from the loss: it hangs on {len(leaves)} tensors (first of shape "
        f"{tuple(leaves[0].shape)}) that are none of them; they were made anew with requires_grad=True, or are another "
        "model's"
    )


def _next_mode(policy: PrecisionPolicy, error: Exception | None) -> None:
    name, chain = policy.name, policy.chain
    message = str(error).splitlines()[0] if error is not None and is_lacking(error) else "on another rank"
    if policy.advance(f"{chain.hardware.name} cannot run the model in it: {message}"):
        return
    advice = f"name another mode ({chain.modes_that_work()}), or have some to go on in with precision.fallback"
    if name == "native_fp16" and policy.trained.dtype == torch.float32:
        advice = (
            "float32 weights fit beside FP16 ones only in layers that cast their input, as LoRA's do: set "
            "precision.trainable_dtype to fp16 (with masters), or use another mode"
        )
    raise UserError(
        f"precision.mode is '{name}', in which {chain.hardware.name} cannot run this model ({message}): {advice}"
    ) from error
