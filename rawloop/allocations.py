"""Counts the bytes and the operations of a step by what they are for, without computing it.

Under torch's FakeTensorMode, operations only determine the shapes of their results. What is made of real tensors alone,
such as ids and masks, is computed: models index by masks, and the shape of the result follows from the values.
"""

import math
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
KINDS = ("frozen weights", "trained weights", "masters", "optimizer", "gradients", "activations", "loss head")
# Fused attention on a CPU, which torch's flop counter does not know: how many tensors stand before the query.
ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: 0,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: 1,
}
INTEGERS = (torch.int64, torch.int32, torch.bool)


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what the operations inside this context allocate. `peaks` has the bytes by kind at the peak of each phase.

    Enter it inside a FakeTensorMode with `allow_non_fake_inputs`. A storage is counted from the operation that makes it
    until it is freed, so tensors that a kernel allocates and frees by itself are not seen. Numbers that are read from
    the device are 1. `flops` counts matrix products, convolutions and attention, as torch's flop counter does, and of
    causal attention half.

    Args:
        widths: the sizes of vocabularies. A tensor whose last dimension is a multiple of one is of the loss head.
    """

    def __init__(self, widths: Collection[int] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.widths = [width for width in widths if width > 1]
        self.now: Counter[str] = Counter()
        self.peaks: dict[str, Counter[str]] = {}
        self.phase = ""
        self.flops = 0
        self._live: dict[int, list[Any]] = {}  # id of a storage -> weak reference, bytes, kind

    def start(self, phase: str) -> None:
        """Start a phase, with a peak of its own."""
        if phase != self.phase:
            self.phase = phase
            self.peaks.setdefault(phase, Counter())
            self._see()

    def hold(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Count tensors as of a kind, whether they are counted already or not."""
        for tensor in tensors:
            self._add(tensor, kind, again=True)

    def _add(self, tensor: Tensor, kind: str, again: bool = False) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        known = self._live.get(key)
        if known is None:
            reference = weakref.ref(storage, lambda _: self._drop(key))
            self._live[key] = [reference, storage.nbytes(), kind]
            self.now[kind] += storage.nbytes()
        elif again:
            self.now[known[2]] -= known[1]
            self.now[kind] += known[1]
            known[2] = kind

    def _drop(self, key: int) -> None:
        _, size, kind = self._live.pop(key)
        self.now[kind] -= size

    def _see(self) -> None:
        if self.now.total() >= self.peaks.setdefault(self.phase, Counter()).total():
            self.peaks[self.phase] = self.now.copy()

    def _kind(self, tensor: Tensor) -> str:
        last = tensor.shape[-1] if tensor.dim() else 1
        return "loss head" if any(last % width == 0 for width in self.widths) else "activations"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation, and count what it allocates."""
        kwargs = kwargs or {}
        result = _run(func, args, kwargs)
        if func in ATTENTION:
            self.flops += attention_flops(*args[ATTENTION[func] :], products=5 if ATTENTION[func] else 2, **kwargs)
        elif func is aten._grouped_mm.default:
            self.flops += grouped_flops(args[0].shape, args[1].shape)
        elif (counted := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += counted(*args, **kwargs, out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf, self._kind(leaf))
        self._see()
        return result


def attention_flops(query: Tensor, key: Tensor, value: Tensor, *more: Any, products: int, **options: Any) -> int:
    """Return the operations of fused attention: 2 products forward, and 5 backward, which repeats the first.

    Args:
        query: (batch, heads, positions, size), as are `key` and `value`, which may have fewer heads.
        more: of the forward pass: dropout, whether it is causal; of the backward pass two tensors before these.
        products: of the size of the scores.
        options: the same by name.
    """
    batch, heads, positions, size = query.shape
    causal = options.get("is_causal", next((flag for flag in more if isinstance(flag, bool)), False))
    return products * 2 * batch * heads * positions * key.shape[2] * size // (2 if causal else 1)


def grouped_flops(one: torch.Size, other: torch.Size, *_: Any, **__: Any) -> int:
    """Return the operations of a product in groups, such as of experts, by the shapes of its factors.

    One of them has the rows of all groups, one after the other, or both have: torch's counter does not know it.
    """
    groups = one[0] if len(one) == len(other) == 3 else 1
    return 2 * groups * one[-2] * one[-1] * other[-1]


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation on fake tensors, or really on real ones alone."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    fake = any(isinstance(tensor, FakeTensor) for tensor in tensors)
    if fake and func is aten._local_scalar_dense.default:
        return 1.0
    if not fake and (tensors or _makes_integers(func, args, kwargs)):
        with unset_fake_temporarily():
            return func(*args, **kwargs)
    if func is aten.index.Tensor:  # the shape of its result is known once the mask is a list of places
        places: list[Tensor | None] = []
        for index in args[1]:
            is_mask = index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor)
            places += _places(index) if is_mask else [index]
        return func(args[0], places)
    if func is aten._grouped_mm.default and args[0].dtype != torch.bfloat16:  # torch's rule for shapes knows no other
        halves = (each.to(torch.bfloat16) if each.is_floating_point() else each for each in args)
        return func(*halves, **kwargs).to(args[0].dtype)
    if func is aten.masked_select.default and not isinstance(args[1], FakeTensor):
        return args[0].new_empty(len(_places(args[1].broadcast_to(args[0].shape))[0]))
    return func(*args, **kwargs)


def _makes_integers(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation without tensors returns integers or a mask."""
    counts = func._overloadpacket is aten.arange and all(isinstance(value, int) for value in args)
    return kwargs.get("dtype") in INTEGERS or (kwargs.get("dtype") is None and counts)


def _places(mask: Tensor) -> list[Tensor]:
    with unset_fake_temporarily():
        return list(mask.nonzero().unbind(1))


def use_gpu_dropout(model: nn.Module) -> None:
    """Let a model's dropout keep a mask of one byte per number, as on a GPU; a CPU's mask has the input's dtype."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            cast(Any, module).forward = partial(_dropout, module)


def _dropout(module: nn.Dropout, numbers: Tensor) -> Tensor:
    return torch.native_dropout(numbers, module.p, True)[0] if module.training and module.p else numbers


def to_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace the weights and buffers of a model on the meta device by fake tensors on the CPU, in place."""
    made: dict[int, Tensor] = {}

    def replaced(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            is_weight = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_weight else empty
        return made[id(tensor)]

    with mode:
        for module in model.modules():
            for tensors in cast(Any, (module._parameters, module._buffers)):
                tensors.update({name: replaced(tensor) for name, tensor in tensors.items() if tensor is not None})


def mark_phases(model: nn.Module, counter: Allocations, blocks: list[nn.ModuleList]) -> None:
    """Count gradients as such, and start a phase of the backward pass at the last and at the first block of each list.

    Then the peak of each phase grows linearly with the number of blocks.
    """
    places: dict[int, str] = {}
    for number, each in enumerate(blocks):
        for place, block in (("last", each[-1]), ("first", each[0])):
            places |= {id(weight): f"backward {number} {place}" for weight in block.parameters()}
    for weight in model.parameters():
        if weight.requires_grad:
            cast(Any, weight).register_post_accumulate_grad_hook(_marker(counter, places.get(id(weight))))


def _marker(counter: Allocations, phase: str | None) -> Callable[[Tensor], None]:
    def mark(weight: Tensor) -> None:
        if phase is not None:
            counter.start(phase)
        if weight.grad is not None:
            counter.hold([weight.grad], "gradients")

    return mark


def extrapolated(base: Counter[str], longer: list[Counter[str]], more: list[int]) -> Counter[str]:
    """Return counts that are linear in the numbers of blocks, for more blocks.

    Args:
        base: the counts of a model with a few blocks in each list.
        longer: for each list the counts with one block more in it.
        more: for each list how many blocks the model has more than the base.
    """
    found = Counter(base)
    for counts, blocks in zip(longer, more, strict=True):
        for name in {*base, *counts}:
            found[name] += blocks * (counts[name] - base[name])
    return found


def peak_of(counts: Counter[str]) -> dict[str, int]:
    """Return the bytes by kind at the highest of the peaks of all phases, from counts named `phase|kind`."""
    phases: dict[str, dict[str, int]] = {}
    for name, size in counts.items():
        phase, bar, kind = name.partition("|")
        if bar:
            kinds = phases.setdefault(phase, dict.fromkeys(KINDS, 0))
            kinds[kind] = kinds.get(kind, 0) + size
    return max(phases.values(), key=lambda kinds: math.fsum(kinds.values()))
