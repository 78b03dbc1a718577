"""One trial pass before DDP and the optimizer exist, when all ranks can still handle an error together.

Later, a rank that fails during a pass would leave the other ranks waiting in DDP's all-reduce.
"""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rawloop.buffers import Moves, Trace, untouched
from rawloop.errors import RawloopError, TrainingError, UserError
from rawloop.precision.gradients import connected
from rawloop.precision.policy import PrecisionPolicy

# Errors of torch and of kernels: the device lacks an operation for a dtype, or dtypes do not match.
LACKING = re.compile(
    r"not implemented for '(Half|BFloat16)'|(not supported|unsupported|undefined type).*(half|float16)"
    r"|(half|float16|dtype|data type).*not supported|expected scalar type|same dtype|dtypes match|mixed dtype"
    r"|dtype.*does not match|type \(.*\) should be the same|(CUBLAS|CUDNN)_STATUS_NOT_SUPPORTED"
    r"|only supports?\b.*(fp16|bf16|half|float16)|(fp16|bf16|half|float16).*only supported",
    re.IGNORECASE,
)


class Trial(NamedTuple):
    """Findings of the trial pass on this rank: names of trained weights without a gradient, and the moving buffers."""

    unused: list[str]
    moves: Moves


def preflight(policy: PrecisionPolicy, loss_of: Callable[[], Tensor]) -> Trial:
    """Run one forward and backward pass on the prepared model, and undo its changes. All ranks call this together.

    If the device lacks an operation for a mode, the policy switches to the next mode. If the model is sharded, a rank
    raises its error at once: the others may be inside of the pass, where no agreement reaches them.

    Args:
        policy: the policy that has prepared the model.
        loss_of: runs the model on a batch and returns a scalar loss. It is called once per mode that is tried, and
            once more if it changes non-persistent buffers.

    Raises:
        UserError: the model runs in none of the remaining modes.
        TrainingError: on some rank the loss depends on no trained weight.
        RawloopError: another rank failed. An error of this rank that is not about dtypes (memory, data) is re-raised.
    """
    while True:
        error, trial = _attempt(policy, loss_of)
        if error is not None and policy.block_runs is not None:
            raise _refused(policy, error) if is_lacking(error) else error
        unconnected, lacks = isinstance(error, TrainingError), error is not None and is_lacking(error)
        lacking, unconnected_somewhere, failed = policy.world.any(
            [lacks, unconnected, error is not None and not lacks and not unconnected]
        )
        if failed:
            other = RawloopError("another rank failed in its first pass; see its message")
            other.is_reporter = False
            raise error or other
        if lacking:
            _next_mode(policy, error)
            error = None  # its frames hold the graph of the pass
        elif unconnected_somewhere:
            raise error or TrainingError("on another rank the loss is not connected to any trained weight")
        else:
            return trial


def is_lacking(error: Exception) -> bool:
    """Return whether an error means that dtypes do not match, or that the device lacks an operation for one."""
    kinds = NotImplementedError | RuntimeError | TypeError | ValueError
    return isinstance(error, kinds) and bool(LACKING.search(str(error)))


def _attempt(policy: PrecisionPolicy, loss_of: Callable[[], Tensor]) -> tuple[Exception | None, Trial]:
    """Run the forward and backward pass, and return their error, if any: the ranks must agree before it is raised."""
    assert policy.model is not None
    trial = Trial([], Moves([], {}, [], []))
    try:
        with untouched(policy.model, weights=True) as trace:
            with _gathering(policy) as weight_of, policy.autocast():
                loss = loss_of()
            used = {id(weight_of.get(id(leaf))) for leaf in _leaves(connected(loss))}
            forward = Trace(policy.model)
            torch.autograd.backward(loss.float())
            named = policy.trained.weights.items()
            unused = [name for name, weight in named if weight.grad is None]
            if policy.block_runs is not None:  # then unused weights get a gradient of zero
                unused = [name for name, weight in named if id(weight) not in used]
            twice = any(moved for _, _, moved in forward.written().values())
            trial = Trial(unused, _moves(policy, loss_of, trace)._replace(twice=twice))
        if len(unused) == len(policy.trained.weights):
            return TrainingError(_unconnected(loss)), trial
    except Exception as error:
        return error, trial
    return None, trial


def _gathering(policy: PrecisionPolicy) -> AbstractContextManager[dict[int, nn.Parameter]]:
    return policy.block_runs.gathering() if policy.block_runs else nullcontext({})


def _moves(policy: PrecisionPolicy, loss_of: Callable[[], Tensor], trace: Trace) -> Moves:
    """Return the buffers that the pass has changed. A second pass shows which non-persistent ones are only caches."""
    assert policy.model is not None
    attributes, written = trace.moved_attributes(), trace.written()
    refused = {name: why for name, (_, why, moved) in written.items() if moved and why is not None}
    again = any(place.key in place.module._non_persistent_buffers_set for place, _, _ in written.values())
    if policy.block_runs is not None:  # all ranks run a pass, or none
        again = policy.world.any([again])[0]
    if again:
        before = Trace(policy.model)
        with torch.no_grad(), policy.autocast():
            loss_of()
        moving = {name for name, (_, _, moved) in before.written().items() if moved}
        refused = {
            name: why
            for name, why in refused.items()
            if name in moving or written[name][0].key not in written[name][0].module._non_persistent_buffers_set
        }
    kept = [name for name, (_, why, _) in written.items() if why is None]
    return Moves(kept, refused, [name for name in written if name not in kept], attributes)


def _leaves(loss: Tensor) -> list[Tensor]:
    """Return the leaves of a loss's graph: what gets a gradient from it."""
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


def _unconnected(loss: Tensor) -> str:
    """Return the error message for a loss from which no trained weight gets a gradient."""
    leaves = _leaves(loss)
    if not leaves:
        return "no trained weight got a gradient from the loss: it depends only on frozen weights"
    return (
        f"no trained weight got a gradient from the loss: it depends on {len(leaves)} other tensors (first of shape "
        f"{tuple(leaves[0].shape)}), which belong to another model or were created with requires_grad=True"
    )


def _next_mode(policy: PrecisionPolicy, error: Exception | None) -> None:
    message = str(error).splitlines()[0] if error is not None and is_lacking(error) else "on another rank"
    refused = _refused(policy, error)
    if not policy.advance(f"{policy.chain.hardware.name} cannot run the model in it: {message}"):
        raise refused from error


def _refused(policy: PrecisionPolicy, error: Exception | None) -> UserError:
    """Return the error message for a mode in which the model does not run."""
    name, chain = policy.name, policy.chain
    message = str(error).splitlines()[0] if error is not None and is_lacking(error) else "on another rank"
    advice = f"set another mode ({chain.modes_that_work()})"
    advice += ", or list fallbacks in precision.fallback" if policy.block_runs is None else ""
    if name == "native_fp16" and policy.trained.dtype == torch.float32:
        advice = (
            "float32 weights work beside FP16 ones only in layers that cast their input, such as LoRA's: set "
            "precision.trainable_dtype to fp16 (with masters), or use another mode"
        )
    return UserError(
        f"precision.mode is '{name}', in which {chain.hardware.name} cannot run this model ({message}): {advice}"
    )
