"""The cross-entropy of many targets without all of their logits at once.

A head of 128,256 words gives 2,048 targets 1 GB of float32 logits, and their cross-entropy takes that three times. Here
the head, what the model does to its logits and the cross-entropy run for one chunk of targets after another, and again
in the backward pass.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.autograd import Function
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from rawloop.contracts import IGNORE
from rawloop.losses import exact
from rawloop.seed import preserved_rng

WHOLE = 2**22  # logits, 16 MiB as float32: up to so many are made at once
LARGEST = 2**25  # logits of a chunk, at most
CHUNKS, FEWEST = 8, 128  # chunks, and targets in one: with few targets a product waits for the weights of the head
Change = Callable[[Tensor], Tensor]


class Call(NamedTuple):
    """One operation of torch, and its result."""

    func: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    result: Any


class Recorded(Tensor):
    """A tensor that remembers what is done to it. `calls` is shared by all that is made from it."""

    calls: list[Call]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and append it to `calls`."""
        kwargs = kwargs or {}
        calls = next(leaf.calls for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Recorded))
        result = super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        for leaf in tree_leaves(result):
            if isinstance(leaf, Recorded):
                leaf.calls = calls
        calls.append(Call(func, args, kwargs, result))
        return result


@dataclass(frozen=True)
class Traced:
    """The hidden states of a batch's targets, and what the model does to the logits of its head.

    Models scale or cap their logits after the head: `calls` are these operations, from `first` to `last`, as the
    model's own forward did them to the logits of one target.

    Args:
        head: the output embeddings.
        rows: (targets, hidden).
        first: (1, 1, vocabulary), from the head.
        last: of the same shape, the model's.
        calls: what the model did in between.
    """

    head: nn.Module
    rows: Tensor
    first: Tensor
    last: Tensor
    calls: Sequence[Call]

    def finish(self, logits: Tensor) -> Tensor:
        """Do to logits of the head (rows, vocabulary), float32 or wider, what the model does to them."""
        values: dict[int, Any] = {id(self.first): logits[None]}

        def again(leaf: Any) -> Any:
            return values.get(id(leaf), leaf)

        for func, args, kwargs, result in self.calls:
            args, kwargs = tree_map(again, (args, kwargs))
            made = func(*args, **kwargs)
            values |= {id(old): new for old, new in zip(tree_leaves(result), tree_leaves(made), strict=True)}
        finished: Tensor = values[id(self.last)][0]
        return exact(finished)

    @torch.no_grad()
    def fault(self) -> str | None:
        """Return why logits of one target cannot be made for two, or None."""
        what = "what the model does to the logits of one target cannot be done to two"
        try:
            with preserved_rng():  # a resumed run tries again, and must draw what an uninterrupted one draws
                made = self.finish(exact(self.head(self.rows[:2])))
        except (RuntimeError, TypeError, ValueError) as error:
            return f"{what} ({error})"
        wanted = (min(2, len(self.rows)), self.last.shape[-1])
        return None if made.shape == wanted else f"{what}: they have the shape {tuple(made.shape)}"


def trace(model: Any, inputs: Mapping[str, Tensor], positions: Tensor, check: bool = True) -> Traced | str:
    """Run a language model of transformers with its head at one target. Return the hidden states of all targets.

    `positions` index the flattened (batch, sequence). Where the head is not called once, or the logits do not come from
    it by operations of torch that work for several targets, too, the reason is returned; `check` tries two.
    """
    rows: list[Tensor] = []
    first: list[Recorded] = []

    def cut(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        rows.append(args[0].flatten(0, 1).index_select(0, positions))
        return (rows[-1][None, :1],)

    def record(_: Any, __: Any, output: Tensor) -> Recorded:
        first.append(_plain(exact(output).detach()).as_subclass(Recorded))
        first[-1].calls = []
        return first[-1]

    head = model.get_output_embeddings()
    hooks = [head.register_forward_pre_hook(cut), head.register_forward_hook(record)] if head else []
    try:
        last = model(**inputs, use_cache=False, return_dict=True).logits
    finally:
        for hook in hooks:
            hook.remove()
    name = type(model).__name__
    if len(first) != 1 or not isinstance(last, Recorded) or last.shape != first[0].shape:
        return f"the logits of {name} do not come from one call of its output embeddings"
    traced = Traced(head, rows[0], first[0], last, tuple(first[0].calls))
    return (traced.fault() if check else None) or traced


def _plain(tensor: Tensor) -> Tensor:
    """Return zeros in place of a fake tensor, as in an estimate: it cannot be of another class, too."""
    if not isinstance(tensor, FakeTensor):
        return tensor
    with unset_fake_temporarily():
        return torch.zeros(tensor.shape, dtype=tensor.dtype)


def cross_entropy(head: Change, finish: Change, rows: Tensor, targets: Tensor, classes: int) -> Tensor:
    """Return the cross-entropy of every target in nats, float32 of the shape of `targets`; 0 where one is -100.

    With more than `WHOLE` logits it is computed in chunks, and their logits again in the backward pass.

    Args:
        head: makes logits of hidden states (rows, hidden).
        finish: makes of these, as float32 or wider, the model's logits (rows, ..., classes).
        rows: hidden states (targets, hidden).
        targets: (targets,) or (targets, codebooks) int64.
        classes: the number of logits of a target.
    """
    count, width, weight = len(targets), classes * targets.shape[1:].numel(), _plain_weight(head)
    size = count if count * width <= WHOLE else max(FEWEST, min(LARGEST // width, -(-count // CHUNKS)))
    differentiated = torch.is_grad_enabled() and size < count
    if differentiated and weight is None and _trained(head) and count < rows.shape[1]:
        size, differentiated = count, False  # each chunk's gradient of the weights would be larger than its logits
    if differentiated and weight is not None:
        head = _summed(head, weight)

    def nats(some: Tensor, wanted: Tensor) -> Tensor:
        scored = finish(exact(head(some))).flatten(0, -2)
        return F.cross_entropy(scored, wanted.flatten(), ignore_index=IGNORE, reduction="none").view_as(wanted)

    run = partial(checkpoint, nats, use_reentrant=False) if differentiated else nats
    pairs = zip(torch.split(rows, max(1, size)), torch.split(targets, max(1, size)), strict=True)
    return torch.cat([run(some, wanted) for some, wanted in pairs])


def unchanged(logits: Tensor) -> Tensor:
    """Return the logits as they are."""
    return logits


def _trained(head: Any) -> bool:
    return any(weight.requires_grad for weight in getattr(head, "parameters", tuple)())


def _plain_weight(head: Any) -> Tensor | None:
    """Return the trained weight of a head that is a product with it and nothing else."""
    if type(head) is not nn.Linear or "forward" in vars(head):
        return None
    if any((head._forward_pre_hooks, head._backward_pre_hooks, head._backward_hooks)):
        return None
    trained = [name for name, weight in head.named_parameters() if weight.requires_grad]
    return head.weight if trained == ["weight"] and "bias" not in dict(head.named_parameters()) else None


def _summed(head: Any, weight: Tensor) -> Change:
    """Return the product of a head with its weight, whose calls add to one gradient of the weight, in place.

    Autograd would hold a gradient for a chunk and two sums: three times the weights of the head. The sum is float32 or
    wider: in 16 bits each chunk would round it once more. Forward hooks of the head, such as a watch's, are called.
    """
    kind = weight.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    sums: list[Tensor] = []
    shared = _Shared.apply(weight, dtype, sums)  # type: ignore[no-untyped-call]

    def product(rows: Tensor) -> Tensor:
        made: Tensor = _Product.apply(rows.to(dtype), shared, sums)  # type: ignore[no-untyped-call]
        return made

    def call(rows: Tensor) -> Tensor:
        head.forward = product
        try:
            made: Tensor = head(rows)
        finally:
            del head.forward
        return made

    return call if head._forward_hooks else product


class _Shared(Function):
    """A weight that several products use, in their dtype; its gradient is what they have summed, in its own."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, dtype: torch.dtype, sums: list[Tensor]) -> Tensor:
        ctx.dtype, ctx.sums = weight.dtype, sums
        ctx.set_materialize_grads(False)
        return weight.view_as(weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return ctx.sums.pop().to(ctx.dtype), None, None


class _Product(Function):
    """(rows, hidden) times (classes, hidden): adds the gradient of the weight to `sums`, and gives autograd none."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, sums: list[Tensor]) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.sums = sums
        return F.linear(rows, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        rows, weight = ctx.saved_tensors
        (gradient,) = gradients
        if not ctx.sums:
            ctx.sums.append(exact(gradient.T @ rows))
        elif ctx.sums[0].dtype == gradient.dtype:
            ctx.sums[0].addmm_(gradient.T, rows)
        else:
            ctx.sums[0].add_(gradient.T @ rows)
        return gradient @ weight, None, None
