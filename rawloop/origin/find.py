"""Runs a pass again, and returns the first place and the rows of the batch that make numbers that are not finite."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from rawloop.buffers import untouched
from rawloop.origin.backward import Nodes, nodes_below, recomputes
from rawloop.origin.forward import Recorder
from rawloop.origin.spots import NOWHERE, Origin
from rawloop.origin.tensors import first_wrong, trouble
from rawloop.origin.twin import Wide
from rawloop.sharding import part_of

MOST_RUNS = 64
MOST_GUILTY = 8  # without a row that is finite: all of them are guilty, or nearly
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


def damaged(model: nn.Module) -> Damage | None:
    """Return the first weight or buffer that is not finite. Buffers may contain -inf, as masks do.

    The running statistics of a norm in training mode are results, and do not count. Of a sharded weight, this rank's
    part is looked at.
    """
    results = {id(b) for m in model.modules() if isinstance(m, _NormBase) and m.training for b in m.buffers()}
    for kind, named in (("weight", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in named:
            if "original_module." in name or id(tensor) in results or not tensor.is_floating_point() or tensor.is_meta:
                continue  # PEFT keeps the originals of modules_to_save without using them
            value = part_of(tensor.detach())
            wrong = ~value.isfinite() if kind == "weight" else value.isnan() | (value == math.inf)
            if count := int(wrong.sum()):
                first = first_wrong(torch.where(wrong, math.nan, 0.0))
                return Damage(kind, name, count, value.numel(), first)
    return None


def find_origin(run: Run, model: nn.Module, given: Mapping[str, Tensor] | None = None) -> Origin | None:
    """Run a pass again, and return the place that makes its loss or its gradients not finite; None if all are finite.

    The model, its gradients, buffers, modes and hooks, and the random streams are as before when it returns. `model` is
    the bare model, `given` are the inputs by name.
    """
    found = _pass(run, Recorder(model, given or {}), model)
    if found is None or found.spot.number < 0 or found.parameter:
        return found
    recorder = Recorder(model, given or {}, found.spot.number)
    again = _pass(run, recorder, model)
    same = again is not None and again.spot == found.spot
    return replace(found, call=recorder.call) if same else found


def is_finite(run: Run, model: nn.Module, backward: bool = True, scale: float = 1.0) -> bool:
    """Return whether a pass is finite: its loss and, with `backward`, its gradients if `scale` multiplies the loss."""
    with _undone(model), torch.set_grad_enabled(backward):
        root = run()
        if trouble(root) or not backward:
            return not trouble(root)
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
                found = recorder.source_of(root) or Origin("forward", "", NOWHERE, kind, root.dtype)
                return replace(found, blocked=found.mask or found.blocked, narrow=recorder.narrow)
            if root.grad_fn is None:
                return None
            nodes = Nodes(recorder)
        with nodes.watching(root):
            source = nodes.source(_gradients(root, nodes.leaves, any(map(recomputes, nodes.seen))))
    return source and replace(source, narrow=recorder.narrow)


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
    """Undo what passes inside do to the model, the random streams and autocast's cache.

    Compiled parts run eagerly, because hooks do not see into their graphs.
    """
    with ExitStack() as contexts:
        contexts.callback(torch.clear_autocast_cache)
        contexts.enter_context(untouched(model, weights=True))
        contexts.enter_context(torch.enable_grad())
        yield


@dataclass
class Rows:
    """The rows, of a batch of `size` (0 if unknown), that alone make a pass not finite.

    `tried` rows were decided, in `runs` passes.
    """

    size: int
    guilty: list[int] = field(default_factory=list)
    tried: int = 0
    runs: int = 0

    @property
    def complete(self) -> bool:
        """Whether every row was decided."""
        return self.tried == self.size


def guilty_rows(size: int, finite: Callable[[Sequence[int]], bool]) -> Rows:
    """Return the rows that alone make a pass not finite. Halves that are finite are not divided further.

    `finite` runs the pass with the rows of these indices in place of the batch's `size` rows, and returns whether it is
    finite.
    """
    found = Rows(size)
    ahead = [list(range(size))] if size > 1 else []
    known_bad = True  # the whole batch
    while ahead and found.runs < MOST_RUNS and (len(found.guilty) < MOST_GUILTY or found.tried > len(found.guilty)):
        part = ahead.pop()
        if not known_bad:
            found.runs += 1
            if finite([part[i % len(part)] for i in range(size)]):
                found.tried += len(part)
                continue
        known_bad = False
        if len(part) == 1:
            found.guilty += part
            found.tried += 1
        else:
            middle = len(part) // 2
            ahead += [part[middle:], part[:middle]]
    return found


def batch_size(tensors: Iterable[Tensor], ids: Sequence[str]) -> int:
    """Return the number of samples: of the names, or else the most common first dimension; 0 without tensors."""
    if ids:
        return len(ids)
    first = Counter(tensor.shape[0] for tensor in tensors if tensor.dim())
    return first.most_common(1)[0][0] if first else 0
