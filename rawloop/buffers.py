"""Copies of a model's buffers: which of them a pass has changed ("moved"), and putting them back."""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rawloop.kept_weights import KeptWeights
from rawloop.seed import preserved_rng


class Place(NamedTuple):
    """The module and the name of a buffer. It is looked up each time, as a forward pass may assign another tensor."""

    module: nn.Module
    key: str

    @property
    def buffer(self) -> Tensor:
        """The current buffer."""
        found = self.module._buffers[self.key]
        assert found is not None
        return found


def places(model: nn.Module) -> dict[str, Place]:
    """Return the place of each buffer of a model by name; a shared buffer is listed once, at its first place."""
    split = {name: name.rpartition(".") for name, _ in model.named_buffers()}
    return {name: Place(model.get_submodule(prefix), key) for name, (prefix, _, key) in split.items()}


class Moves(NamedTuple):
    """Names of the buffers that a training pass moves; `refused` has those that cannot be saved, each with the reason.

    `caches` are written in each pass and depend only on its batch. `attributes` are numbers and tensors of modules that
    move but are not buffers. `twice` means that backward, which recomputes activations, moves buffers again.
    """

    moved: list[str]
    refused: dict[str, str]
    caches: list[str]
    attributes: list[str]
    twice: bool = False


class Trace:
    """A copy of a model's buffers, for comparing and restoring them.

    It includes numbers and tensors that are plain attributes of modules: often one of them describes a cache.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tables = [(prefix, module, dict(module._buffers)) for prefix, module in model.named_modules()]
        self.attributes = [
            (prefix, module, name, value)
            for prefix, module, _ in self.tables
            for name, value in vars(module).items()
            if name != "training" and isinstance(value, int | float | Tensor)
        ]
        tensors = [b for _, _, table in self.tables for b in table.values() if b is not None]
        tensors += [value for *_, value in self.attributes if isinstance(value, Tensor)]
        self.before = {id(tensor): (tensor, tensor._version, tensor.detach().clone()) for tensor in tensors}

    def written(self) -> dict[str, tuple[Place, str | None, bool]]:
        """Return the buffers that were written: place, why they cannot be saved (or None), and whether they moved."""
        found: dict[str, tuple[Place, str | None, bool]] = {}
        for prefix, module, table in self.tables:
            for key in dict.fromkeys([*table, *module._buffers]):
                old, new = table.get(key), module._buffers.get(key)
                value = None if old is None else self.before[id(old)][2]
                moved = not _same(value, new)
                # BatchNorm's kernels write without increasing the version, so the value is compared too.
                if not moved and old is new and (old is None or self.before[id(old)][1] == old._version):
                    continue
                why = _why_not_saved(value, new)
                if why is None and key in module._non_persistent_buffers_set:
                    why = "is registered with persistent=False, so no file of the model contains it"
                found[f"{prefix}.{key}".lstrip(".")] = Place(module, key), why, moved
        return found

    def moved_attributes(self) -> list[str]:
        """Return the names of plain attributes of modules that have another value now."""
        return [
            f"{prefix}.{name}".lstrip(".")
            for prefix, module, name, value in self.attributes
            if not _same(self.before[id(value)][2] if id(value) in self.before else value, vars(module).get(name))
        ]

    def restore(self) -> None:
        """Restore all values. Buffers that did not move are not written, and new ones are kept."""
        for _, module, table in self.tables:
            module._buffers.update(table)
        for _, module, name, value in self.attributes:
            vars(module)[name] = value
        with torch.no_grad():
            for tensor, _, value in self.before.values():
                if not torch.equal(tensor, value):
                    tensor.copy_(value)


def _same(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if kind_of(one) != kind_of(other):
            return False
        return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())
    return one is other or (type(one) is type(other) and one == other)


def _why_not_saved(old: Tensor | None, new: Tensor | None) -> str | None:
    if old is None or new is None:
        return f"is {'created' if old is None else 'removed'} by the forward pass"
    if (old.shape, old.dtype) != (new.shape, new.dtype):
        return f"changes from {kind_of(old)} to {kind_of(new)}"
    return "is complex" if new.is_complex() else None


def kind_of(tensor: Tensor) -> str:
    """Return dtype and shape in words, such as `float32 (2, 3)`."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


@contextmanager
def untouched(model: nn.Module, training: bool | None = None, weights: bool = False) -> Iterator[Trace]:
    """Restore a model's buffers, modes, gradients and random streams on exit, whatever passes run inside.

    Args:
        model: any module.
        training: the mode of all its modules inside the context; None does not change it.
        weights: also restore weights that the passes write. Compiled modules run uncompiled, so that writes are seen.

    Yields:
        the buffers on entry.
    """
    modes = [(module, module.training) for module in model.modules()]  # `train(mode)` would set all modules alike
    gradients = [(weight, weight.grad) for weight in model.parameters()]
    trace, kept = Trace(model), KeptWeights(model.parameters()) if weights else None
    try:
        for weight, _ in gradients:
            weight.grad = None  # backward inside would add to it in place
        if training is not None:
            model.train(training)
        with preserved_rng(), nullcontext() if kept is None else _uncompiled(), kept or nullcontext():
            yield trace
    finally:
        trace.restore()
        if kept is not None:
            kept.restore()
        for weight, gradient in gradients:
            weight.grad = gradient
        for module, mode in modes:
            module.training = mode


def _uncompiled() -> AbstractContextManager[Any]:
    """Run compiled modules as if they were not: a mode does not see into graphs, and code that dynamo meets under a
    `TorchDispatchMode` is never compiled again.
    """
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
