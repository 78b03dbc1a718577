"""Buffers that a forward pass changes, such as the running means of BatchNorm.

They matter as much as weights, but no optimizer, no all-reduce and no adapter's file looks after them. One pass before
training finds them by comparison.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from rawloop.dist import World
from rawloop.errors import UserError
from rawloop.seed import preserved_rng


class Place(NamedTuple):
    """The module and the name of a buffer. A forward pass may assign another tensor, so it is looked up each time."""

    module: nn.Module
    key: str

    @property
    def buffer(self) -> Tensor:
        """The buffer as it is now."""
        found = self.module._buffers[self.key]
        assert found is not None
        return found


def places(model: nn.Module) -> dict[str, Place]:
    """Return the place of each buffer of a model, by name; of a shared buffer, the first place."""
    found, seen = {}, set()
    for prefix, module in model.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and id(buffer) not in seen:
                seen.add(id(buffer))
                found[_joined(prefix, key)] = Place(module, key)
    return found


class Moves(NamedTuple):
    """The buffers that a training pass moves, by name, and why some of them cannot be kept in checkpoints.

    `caches` are written in each pass and depend on its batch alone. `attributes` are numbers and tensors of modules
    that move and are no buffers. `twice`: the backward pass moves buffers again, as it recomputes activations.
    """

    moved: list[str]
    refused: dict[str, str]
    caches: list[str]
    attributes: list[str]
    twice: bool = False


class Trace:
    """A copy of a model's buffers, to compare them with later and to restore them.

    Numbers and tensors that are plain attributes of modules are copied too: often one of them describes a cache.
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
        """Return the buffers that were written: their place, why they cannot be kept (or None), whether they moved."""
        found: dict[str, tuple[Place, str | None, bool]] = {}
        for prefix, module, table in self.tables:
            for key in dict.fromkeys([*table, *module._buffers]):
                old, new = table.get(key), module._buffers.get(key)
                value = None if old is None else self.before[id(old)][2]
                moved = not _same(value, new)
                # BatchNorm's kernels write without counting it as a version: the value tells
                if not moved and old is new and (old is None or self.before[id(old)][1] == old._version):
                    continue
                why = _not_holdable(value, new)
                if why is None and key in module._non_persistent_buffers_set:
                    why = "is registered with persistent=False, so that no file of the model holds it"
                found[_joined(prefix, key)] = Place(module, key), why, moved
        return found

    def moved_attributes(self) -> list[str]:
        """Return the names of numbers and tensors of modules that have another value now."""
        return [
            _joined(prefix, name)
            for prefix, module, name, value in self.attributes
            if not _same(self.before[id(value)][2] if id(value) in self.before else value, vars(module).get(name))
        ]

    def put_back(self) -> None:
        """Restore all values. Buffers that did not move are not written to, and new ones stay."""
        for _, module, table in self.tables:
            module._buffers.update(table)
        for _, module, name, value in self.attributes:
            vars(module)[name] = value
        with torch.no_grad():
            for tensor, _, value in self.before.values():
                if not torch.equal(tensor, value):
                    tensor.copy_(value)


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _same(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if _kind(one) != _kind(other):
            return False
        return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())
    return one is other or (type(one) is type(other) and one == other)


def _not_holdable(old: Tensor | None, new: Tensor | None) -> str | None:
    if old is None or new is None:
        return f"is {'made' if old is None else 'removed'} by the forward pass"
    if (old.shape, old.dtype) != (new.shape, new.dtype):
        return f"changes from {_kind(old)} to {_kind(new)}"
    return "is complex" if new.is_complex() else None


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


@contextmanager
def untouched(model: nn.Module, training: bool | None = None) -> Iterator[Trace]:
    """Run passes of a model that leave no trace: buffers, modes, gradients and random streams are put back on exit.

    Args:
        model: any module.
        training: the mode of all its modules inside the context; None leaves their modes as they are.

    Yields:
        the buffers as they were on entry, to be compared with what the passes have made of them.
    """
    modes = [(module, module.training) for module in model.modules()]  # a child may be in another mode than its parent
    gradients = [(weight, weight.grad) for weight in model.parameters()]
    trace = Trace(model)
    try:
        for weight, _ in gradients:
            weight.grad = None  # a backward pass inside would add to it in place
        if training is not None:
            model.train(training)
        with preserved_rng():
            yield trace
    finally:
        trace.put_back()
        for weight, gradient in gradients:
            weight.grad = gradient
        for module, mode in modes:
            module.training = mode


class MovingBuffers:
    """The buffers that training moves: made equal on all ranks after an update, restored after a skipped one.

    Around each window of a loop: `begin`, the passes, then `agree` if the update was applied and `put_back` if not.
    Nothing waits for the device. Without names it does nothing.

    Args:
        model: the trained model.
        names: the buffers that move, the same on all ranks.
        twice: the backward pass moves them as well.
        watched: other buffers, none of which may move.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str] = (), twice: bool = False, watched: Sequence[str] = ()
    ) -> None:
        found = places(model)
        self.places, self.twice = {name: found[name] for name in names}, twice
        self._watched = {name: found[name] for name in watched if name in found and name not in self.places}
        self._stamps: list[tuple[int, int]] = []
        self._before: list[Tensor] = []

    def begin(self) -> None:
        """Remember the buffers before a window."""
        self._before = self.values()
        self._stamps = self._now()

    def values(self) -> list[Tensor]:
        """Return copies of the buffers."""
        return [place.buffer.clone() for place in self.places.values()]

    def floats(self) -> list[Tensor]:
        """Return the buffers of floats themselves."""
        return [p.buffer for p in self.places.values() if p.buffer.is_floating_point()]

    def write(self, values: Sequence[Tensor]) -> None:
        """Write copies that `values` returned into the buffers."""
        with torch.no_grad():
            for place, value in zip(self.places.values(), values, strict=True):
                if place.buffer.shape == value.shape:  # its dtype may be another, after a fallback
                    place.buffer.copy_(value)

    def put_back(self) -> None:
        """Restore the values from before the window."""
        self.write(self._before)

    def agree(self, world: World) -> None:
        """Make them equal on all ranks: floats become their mean, other numbers their maximum."""
        pairs = [(place.buffer, before) for place, before in zip(self.places.values(), self._before, strict=True)]
        # `trouble` reports one of another shape: the other ranks must not wait for this one
        world.make_equal([now if _kind(now) == _kind(before) else before for now, before in pairs])

    def trouble(self) -> str | None:
        """Say what the window has done wrong to buffers on this rank, or return None."""
        for (name, place), before in zip(self.places.items(), self._before, strict=True):
            if place.buffer.shape != before.shape:
                return f"has changed the buffer {name} from {_kind(before)} to {_kind(place.buffer)}"
        for name, old, new in zip(self._watched, self._stamps, self._now(), strict=True):
            if old != new:
                return (
                    f"has moved the buffer {name}, which the first micro-batch had not: no checkpoint would hold it, "
                    "or all ranks alike; let the first micro-batch reach it, or keep its module in evaluation mode"
                )
        return None

    def _now(self) -> list[tuple[int, int]]:
        return [(id(place.buffer), place.buffer._version) for place in self._watched.values()]


def find_moving_buffers(model: nn.Module, moves: Moves, world: World, watch: bool) -> MovingBuffers:
    """Decide which buffers training moves, from those that the first batch moved on any rank. All ranks call this.

    Args:
        model: the trained model.
        moves: the buffers that this rank's first batch moved.
        world: the ranks.
        watch: check in each window that no other buffer moves.

    Raises:
        UserError: one of them cannot be kept in checkpoints, on any rank.
    """
    shares = world.gather(moves)
    refused = {name: why for share in shares for name, why in share.refused.items()}
    if refused:
        name, why = next(iter(refused.items()))
        more = f" ({len(refused)} such buffers: {', '.join(list(refused)[:5])})" if len(refused) > 1 else ""
        raise world.raised_on_all(
            UserError(
                f"training moves the buffer {name}, which {why}{more}: no checkpoint could hold it, and eval_loss "
                "would depend on the batches before; register it in __init__ with its final shape and "
                "persistent=True, or do not write it in forward"
            )
        )
    found = places(model)
    moved = {name for share in shares for name in share.moved}
    # PEFT keeps the modules of modules_to_save as they were beside those that run.
    originals = [getattr(module, "original_module", None) for module in model.modules()]
    unused = {inner for module in originals if isinstance(module, nn.Module) for inner in module.modules()}
    norms = {  # the first batch need not reach them
        name
        for name, (module, _) in found.items()
        if isinstance(module, _NormBase) and module.training and module.track_running_stats and module not in unused
    }
    caches = {name for share in shares for name in share.caches}
    watched = [name for name in found if name not in caches] if watch else []
    names = [name for name in found if name in moved or name in norms]
    return MovingBuffers(model, names, any(share.twice for share in shares), watched)


def in_words(buffers: MovingBuffers, moves: Moves, beside: Mapping[str, str]) -> list[str]:
    """Return what the user should know; `beside` are buffers that PEFT's own file does not hold, and their modules."""
    lines = []
    if names := list(buffers.places):
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        lines.append(
            f"training moves {len(names)} buffers ({', '.join(names[:3])}{more}): they are made equal over ranks after "
            "each update, put back where one is skipped, and kept in checkpoints"
        )
        if any(isinstance(place.module, _NormBase) for place in buffers.places.values()):
            lines[-1] += "; BatchNorm mixes the samples of a micro-batch, so that its size changes what is trained"
        if buffers.twice:
            lines[-1] += "; activations are recomputed, which moves them twice: the second time is undone"
    if modules := ", ".join(dict.fromkeys(beside.values())):
        lines.append(
            f"{len(beside)} of these buffers are not in PEFT's own file and a plain load of the adapter leaves them as "
            "in the base model: `rawloop evaluate` and `rawloop merge` read them from adapter/buffers.safetensors; "
            f"--adapter.modules_to_save '[{modules}]' has them in PEFT's file"
        )
    if moves.attributes:
        lines.append(
            f"training moves {', '.join(moves.attributes[:5])}, which are no buffers: no checkpoint holds them; "
            "if the loss depends on them, register them as buffers"
        )
    return lines
