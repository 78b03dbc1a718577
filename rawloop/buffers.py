"""Buffers that training changes ("moves"), such as the running means of BatchNorm.

They matter as much as weights, but no optimizer, all-reduce or adapter file handles them. One pass before training
finds them by comparison.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from rawloop.dist import World
from rawloop.errors import UserError, first_few
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
        if _kind(one) != _kind(other):
            return False
        return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())
    return one is other or (type(one) is type(other) and one == other)


def _why_not_saved(old: Tensor | None, new: Tensor | None) -> str | None:
    if old is None or new is None:
        return f"is {'created' if old is None else 'removed'} by the forward pass"
    if (old.shape, old.dtype) != (new.shape, new.dtype):
        return f"changes from {_kind(old)} to {_kind(new)}"
    return "is complex" if new.is_complex() else None


def _kind(tensor: Tensor) -> str:
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


class MovingBuffers:
    """The buffers that training moves: made equal on all ranks after an update, restored after a skipped one.

    In each window of a loop call `start_window`, run the passes, then call `make_equal` if the update was applied, or
    `restore` if it was skipped. Nothing waits for the device. Without names it does nothing.

    Args:
        model: the trained model.
        names: the buffers that move, the same on all ranks.
        twice: backward moves them again.
        watched: other buffers, which must not move.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str] = (), twice: bool = False, watched: Sequence[str] = ()
    ) -> None:
        found = places(model)
        self.places, self.twice = {name: found[name] for name in names}, twice
        self._watched = {name: found[name] for name in watched if name in found and name not in self.places}
        self._stamps: list[tuple[int, int]] = []
        self._before: list[Tensor] = []

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.places or self._watched)

    def start_window(self) -> None:
        """Copy the buffers before a window."""
        self._before = self.values()
        self._stamps = self._now()

    def before(self) -> list[Tensor]:
        """Return their values before the window."""
        return self._before

    def values(self) -> list[Tensor]:
        """Return copies of the buffers."""
        return [place.buffer.clone() for place in self.places.values()]

    def floats(self) -> list[Tensor]:
        """Return the float buffers themselves."""
        return [p.buffer for p in self.places.values() if p.buffer.is_floating_point()]

    def write(self, values: Sequence[Tensor]) -> None:
        """Copy the result of `values` into the buffers."""
        with torch.no_grad():
            for place, value in zip(self.places.values(), values, strict=True):
                if place.buffer.shape == value.shape:  # the dtype may differ after a fallback
                    place.buffer.copy_(value)

    def restore(self) -> None:
        """Restore the values from before the window."""
        self.write(self._before)

    def make_equal(self, world: World) -> None:
        """Make the buffers equal on all ranks: the mean of floats, the maximum of other numbers."""
        pairs = [(place.buffer, before) for place, before in zip(self.places.values(), self._before, strict=True)]
        # A buffer of another shape is replaced, so that no rank waits; `problem` reports it.
        world.make_equal([now if _kind(now) == _kind(before) else before for now, before in pairs])

    def problem(self) -> str | None:
        """Return what is wrong with this rank's buffers after a window, or None."""
        for (name, place), before in zip(self.places.items(), self._before, strict=True):
            if place.buffer.shape != before.shape:
                return f"has changed the buffer {name} from {_kind(before)} to {_kind(place.buffer)}"
        for name, old, new in zip(self._watched, self._stamps, self._now(), strict=True):
            if old != new:
                return (
                    f"has moved the buffer {name}, which the first micro-batch had not: it would be in no checkpoint, "
                    "and differ over ranks; let the first micro-batch reach it, or keep its module in evaluation mode"
                )
        return None

    def _now(self) -> list[tuple[int, int]]:
        return [(id(place.buffer), place.buffer._version) for place in self._watched.values()]


def find_moving_buffers(model: nn.Module, moves: Moves, world: World, watch: bool) -> MovingBuffers:
    """Join the buffers that the first batch moved on any rank. All ranks call this.

    Args:
        model: the trained model.
        moves: the findings of this rank's first batch.
        world: the ranks.
        watch: check in each window that no other buffer moves.

    Raises:
        UserError: on some rank, a buffer that moves cannot be saved.
    """
    shares = world.gather(moves)
    refused = {name: why for share in shares for name, why in share.refused.items()}
    if refused:
        name, why = next(iter(refused.items()))
        more = f" ({len(refused)} such buffers: {first_few(refused)})" if len(refused) > 1 else ""
        raise world.raised_on_all(
            UserError(
                f"training moves the buffer {name}, which {why}{more}: no checkpoint could contain it, and eval_loss "
                "would depend on earlier batches; register it in __init__ with its final shape and "
                "persistent=True, or do not write it in forward"
            )
        )
    found = places(model)
    moved = {name for share in shares for name in share.moved}
    # PEFT keeps the originals of modules_to_save, which do not run.
    originals = [getattr(module, "original_module", None) for module in model.modules()]
    unused = {inner for module in originals if isinstance(module, nn.Module) for inner in module.modules()}
    norms = {  # these move even if the first batch does not reach them
        name
        for name, (module, _) in found.items()
        if isinstance(module, _NormBase) and module.training and module.track_running_stats and module not in unused
    }
    caches = {name for share in shares for name in share.caches}
    watched = [name for name in found if name not in caches] if watch else []
    names = [name for name in found if name in moved or name in norms]
    return MovingBuffers(model, names, any(share.twice for share in shares), watched)


def buffer_notices(buffers: MovingBuffers, moves: Moves, beside: Mapping[str, str]) -> list[str]:
    """Return messages for the user; `beside` maps buffers that are not in PEFT's file to their modules."""
    lines = []
    if names := list(buffers.places):
        lines.append(
            f"training moves {len(names)} buffers ({first_few(names, most=3)}): they are made equal over ranks after "
            "each update, restored after a skipped one, and saved in checkpoints"
        )
        if any(isinstance(place.module, _NormBase) for place in buffers.places.values()):
            lines[-1] += "; BatchNorm mixes the samples of a micro-batch, so its size changes what is trained"
        if buffers.twice:
            lines[-1] += "; activations are recomputed, which moves them twice: the second time is undone"
    if modules := ", ".join(dict.fromkeys(beside.values())):
        lines.append(
            f"{len(beside)} of these buffers are not in PEFT's file, so PEFT alone loads the adapter with those of the "
            "base model: `rawloop evaluate` and `rawloop merge` read them from adapter/buffers.safetensors; "
            f"--adapter.modules_to_save '[{modules}]' puts them into PEFT's file"
        )
    if moves.attributes:
        lines.append(
            f"training moves {first_few(moves.attributes)}, which are not buffers: no checkpoint contains them; "
            "if the loss depends on them, register them as buffers"
        )
    return lines
