"""Follows the gradients that are not finite through a backward pass: each autograd node."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rawloop.origin.forward import Recorder
from rawloop.origin.spots import NOWHERE, Origin, Spot
from rawloop.origin.tensors import floats_in, largest, limit, trouble

SUM = "the sum of gradients"  # of gradients that are finite one by one
CHANGED = "a change of the gradient"  # their sum is finite as well, so that a hook has changed it


def recomputes(node: Any) -> bool:
    """Whether a node runs a backward pass of its own, as reentrant checkpoints do."""
    return bool(node.name() == "CheckpointFunctionBackward")


def nodes_below(starts: Iterable[Any], seen: set[Any]) -> Iterator[Any]:
    """Yield the autograd nodes from which the starts are computed, and add them to `seen`; those seen are left out."""
    ahead = [node for node in starts if node is not None]
    while ahead:
        node = ahead.pop()
        if node not in seen:
            seen.add(node)
            yield node
            ahead += [following for following, _ in node.next_functions if following is not None]


class Nodes:
    """Hooks on every autograd node below a root."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.leaves: list[Tensor] = []
        self.seen: set[Any] = set()
        self._accumulators: dict[int, Any] = {}  # id of a leaf -> its node
        self._sources: dict[Any, Origin] = {}  # by the node that receives the gradient
        self._spots: dict[Any, Spot] = {}
        self._parts: dict[Any, float] = {}  # the sum of the largest magnitudes that a node was given
        self._hooks = ExitStack()
        self._ran = 0

    @contextmanager
    def watching(self, root: Tensor) -> Iterator["Nodes"]:
        """Watch the nodes below the root, and those that checkpointed modules create in backward."""
        with self._hooks:
            self._watch([root.grad_fn], None)
            self.recorder.on_exit = lambda made, spot: self._watch([t.grad_fn for t in floats_in(made)], spot)
            try:
                yield self
            finally:
                self.recorder.on_exit = None

    def source(self, gradients: Sequence[Tensor | None]) -> Origin | None:
        """Return the first source of the leaves' gradients that are not finite."""
        found = []
        for leaf, gradient in zip(self.leaves, gradients, strict=True):
            if gradient is not None and (kind := trouble(gradient)):
                node = self._accumulators[id(leaf)]
                size = self._parts.get(node, 0.0)
                alone = Origin("backward", _sum(size, gradient), NOWHERE, kind, gradient.dtype, order=self._ran + 1)
                alone.gradient, alone.hook = size, hook_of(leaf) if alone.operation == CHANGED else ""
                alone.parameter = self.recorder.weights.get(id(leaf), "a tensor outside the model")
                found.append(self._sources.get(node, alone))
        return min(found, key=lambda origin: origin.order, default=None)

    def _watch(self, starts: Iterable[Any], spot: Spot | None) -> None:
        for node in nodes_below(starts, self.seen):
            if not hasattr(node, "variable"):
                self._spots[node] = spot or self.recorder.spot_of(node._sequence_nr()) or NOWHERE
                self._hooks.callback(node.register_hook(self._hook(node)).remove)
            elif id(node.variable) not in self._accumulators:
                self._accumulators[id(node.variable)] = node
                self.leaves.append(node.variable)

    def _hook(self, node: Any) -> Any:
        def look(made: tuple[Tensor | None, ...], received: tuple[Tensor | None, ...]) -> None:
            with torch._C.DisableTorchFunction():
                self._look(node, made, received)

        return look

    def _look(self, node: Any, made: Sequence[Tensor | None], received: Sequence[Tensor | None]) -> None:
        self._ran += 1
        source = self._sources.get(node)
        wrong = [gradient for gradient in floats_in(received) if trouble(gradient)]
        if wrong and source is None:
            source = self._source(node, _sum(self._parts.get(node, 0.0), wrong[0]), received, wrong[0])
        for (following, _), gradient in zip(node.next_functions, made, strict=False):
            if following is None or gradient is None:
                continue
            if not any(trouble(one) for one in floats_in(gradient)):
                self._parts[following] = self._parts.get(following, 0.0) + _size(gradient)
                continue
            if source is None and recomputes(node):  # its own backward pass has run already
                source = min(self._sources.values(), key=lambda one: one.order, default=None)
            source = source or self._source(node, operation_of(node.name()), received, gradient)
            known = self._sources.get(following)
            if known is None or source.order < known.order:
                self._sources[following] = source

    def _source(self, node: Any, operation: str, received: Any, wrong: Tensor) -> Origin:
        made = Origin("backward", operation, self._spots[node], trouble(wrong), wrong.dtype, order=self._ran)
        made.gradient = largest(floats_in(received))
        return made


def _size(gradient: Any) -> float:
    found = [*floats_in(gradient)]
    return largest(found) if found else 0.0


def _sum(size: float, wrong: Tensor) -> str:
    """Return what makes a gradient not finite whose parts are: their sum, if parts of this size can overflow."""
    return SUM if size > limit(wrong.dtype) else CHANGED


def hook_of(tensor: Tensor) -> str:
    """Return the last hook on a tensor's gradient, as `train.py:41: scaled`; empty if there is none."""
    hooks = [*(tensor._backward_hooks or {}).values()]
    code = getattr(hooks[-1], "__code__", None) if hooks else None
    return f"{Path(code.co_filename).name}:{code.co_firstlineno}: {code.co_qualname}" if code is not None else ""


def operation_of(name: str) -> str:
    """`SqrtBackward0` -> `sqrt`, `LinalgVectorNormBackward0` -> `linalg_vector_norm`; other names stay."""
    base, found, tail = name.partition("Backward")
    if not found or not tail.isdigit():
        return name
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in base).lstrip("_")
