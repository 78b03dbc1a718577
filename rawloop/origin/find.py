"""Runs a pass again and returns the first place that makes numbers that are not finite."""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from rawloop.buffers import untouched
from rawloop.origin.backward import CHANGED, Nodes, hook_of, nodes_below, recomputes
from rawloop.origin.forward import NOWHERE, Call, Recorder, Source, Spot
from rawloop.origin.tensors import first_wrong, trouble
from rawloop.origin.twin import Wide

Run = Callable[[], Tensor]  # runs a forward pass from the same random streams each time; returns the root of backward


class Damage(NamedTuple):
    """A weight or buffer that is not finite: its kind, name, how many numbers are not, of how many, the first index."""

    kind: str
    name: str
    wrong: int
    total: int
    first: tuple[int, ...]

    def __str__(self) -> str:
        return f"the {self.kind} '{self.name}' is not finite ({self.wrong:,} of {self.total:,} numbers)"


@dataclass
class Origin:
    """The first place with finite inputs and an output or gradient that is not finite.

    Args:
        phase: forward or backward.
        operation: `torch.log`; in backward the name of the autograd node, such as `sqrt`.
        spot: the place in the forward pass.
        kind: `nan` or `inf`.
        dtype: of the tensor that is not finite.
        given: the name of the input that is not finite, if that is the origin.
        blocked: the operation makes it from the infinities of a mask.
        gradient: the largest finite magnitude of the gradient that the operation received; NaN in forward.
        parameter: the parameter whose gradient it is, if gradients are finite one by one and their sum is not.
        narrow: a 16-bit dtype that an operation of the pass has made; None if there was none.
        later: the operation that stumbles over the zero which a division has made of the infinity; empty without one.
        hook: the function that changes a finite gradient to one that is not; empty if no hook is known.
        call: the operation with its arguments, to run it again; None if it cannot be captured.
    """

    phase: Literal["forward", "backward"]
    operation: str
    spot: Spot
    kind: str
    dtype: torch.dtype
    given: str = ""
    blocked: bool = False
    gradient: float = math.nan
    parameter: str = ""
    narrow: torch.dtype | None = None
    later: str = ""
    hook: str = ""
    call: Call | None = None


def damaged(model: nn.Module) -> Damage | None:
    """Return the first weight or buffer that is not finite. Buffers may contain -inf, as masks do.

    The running statistics of a norm in training mode are results, and do not count.
    """
    results = {id(b) for m in model.modules() if isinstance(m, _NormBase) and m.training for b in m.buffers()}
    for kind, named in (("weight", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in named:
            if "original_module." in name or id(tensor) in results or not tensor.is_floating_point() or tensor.is_meta:
                continue  # PEFT keeps the originals of modules_to_save without using them
            value = tensor.detach()
            wrong = ~value.isfinite() if kind == "weight" else value.isnan() | (value == math.inf)
            if count := int(wrong.sum()):
                first = first_wrong(torch.where(wrong, math.nan, 0.0))
                return Damage(kind, name, count, tensor.numel(), first)
    return None


def find_origin(run: Run, model: nn.Module, given: Mapping[str, Tensor] | None = None) -> Origin | None:
    """Run a pass again, and return the place that makes its loss or its gradients not finite; None if all are finite.

    The model, its gradients, buffers, modes and hooks, and the random streams are as before when it returns.

    Args:
        run: the forward pass.
        model: the bare model.
        given: the inputs, by name.
    """
    found = _pass(run, Recorder(model, given or {}), model)
    if found is None or found.spot.number < 0 or found.parameter:
        return found
    recorder = Recorder(model, given or {}, found.spot.number)
    again = _pass(run, recorder, model)
    same = again is not None and again.spot == found.spot
    return replace(found, call=recorder.call) if same else found


def is_finite(run: Run, model: nn.Module, backward: bool = True, scale: float = 1.0) -> bool:
    """Return whether a pass is finite: its loss and, with `backward`, its gradients.

    Args:
        run: the forward pass.
        model: the bare model.
        backward: run the backward pass too.
        scale: multiplies the root of backward.
    """
    if not backward:
        with _undone(model), torch.no_grad():
            return not trouble(run())
    with _undone(model):
        root = run()
        if trouble(root):
            return False
        return not any(trouble(gradient) for _, gradient in gradients_of(root * scale, model) if gradient is not None)


def is_finite_in(run: Run, model: nn.Module, dtype: torch.dtype) -> bool | None:
    """Return whether the loss of a pass is finite if every operation runs in a wider dtype, without autocast.

    It is None if the pass does not run so, as a kernel may not know the dtype.
    """
    try:
        with _undone(model), torch.no_grad(), Wide(dtype):
            root = run()
    except (RuntimeError, TypeError, ValueError):
        return None
    return not trouble(root)


def gradients_of(root: Tensor, model: nn.Module) -> list[tuple[Tensor, Tensor | None]]:
    """Return the leaves of a graph with their gradients, without writing them. Call it in `untouched`."""
    below = list(nodes_below([root.grad_fn], set()))
    inner = any(map(recomputes, below))
    leaves = [node.variable for node in below if hasattr(node, "variable")]
    leaves += [weight for weight in model.parameters() if inner and weight.requires_grad]
    leaves = list({id(leaf): leaf for leaf in leaves}.values())
    return list(zip(leaves, _gradients(root, leaves, inner), strict=True)) if leaves else []


def _pass(run: Run, recorder: Recorder, model: nn.Module) -> Origin | None:
    with _undone(model), recorder.watching():
        root = run()
        with torch._C.DisableTorchFunction():
            if kind := trouble(root):
                return _forward(recorder.source_of(root) or Source(NOWHERE, kind, root.dtype), recorder)
            if root.grad_fn is None:
                return None
            nodes = Nodes(recorder)
        with nodes.watching(root):
            found = nodes.source(_gradients(root, nodes.leaves, any(map(recomputes, nodes.seen))))
    if found is None:
        return None
    source, leaf = found
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return Origin(
        "backward",
        source.operation,
        source.spot or NOWHERE,
        source.kind,
        source.dtype,
        gradient=source.largest,
        parameter=names.get(id(leaf), "a tensor outside the model") if source.spot is None else "",
        narrow=recorder.narrow,
        hook=hook_of(leaf) if source.operation == CHANGED else "",
    )


def _forward(source: Source, recorder: Recorder) -> Origin:
    return Origin(
        "forward",
        source.spot.operation,
        source.spot,
        source.kind,
        source.dtype,
        source.given,
        source.mask or source.blocked_by is not None,
        narrow=recorder.narrow,
        later=source.later,
    )


def _gradients(root: Tensor, leaves: Sequence[Tensor], recomputes: bool) -> Sequence[Tensor | None]:
    """Return the gradients of the leaves, a list that may grow in backward.

    A reentrant checkpoint needs `backward`, which writes gradients to `.grad`.
    """
    if not recomputes:
        return torch.autograd.grad(root, leaves, torch.ones_like(root), allow_unused=True)
    before = [leaf.grad for leaf in leaves]
    try:
        for leaf in leaves:
            leaf.grad = None
        torch.autograd.backward(root, torch.ones_like(root))
        return [leaf.grad for leaf in leaves]
    finally:
        for leaf, gradient in zip(leaves, before, strict=False):
            leaf.grad = gradient


@contextmanager
def _undone(model: nn.Module) -> Iterator[None]:
    """Undo what passes inside do to the model, the random streams and autocast's cache. Compiled parts run eagerly.

    Hooks do not see into the graphs of compiled parts.
    """
    with ExitStack() as contexts:
        contexts.callback(torch.clear_autocast_cache)
        contexts.enter_context(untouched(model))
        if "torch._dynamo" in sys.modules:
            contexts.enter_context(torch.compiler.set_stance("force_eager"))
        contexts.enter_context(torch.enable_grad())
        yield
