"""Buffers that a forward pass moves, such as the running means of BatchNorm: they are no weights, and count as much.

Nothing that is made for weights looks after them: no optimizer, no all-reduce, and no adapter's file. What moves is
found by comparison, in one pass before training.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from rawloop.errors import UserError
from rawloop.seed import preserved_rng

if TYPE_CHECKING:  # the precision policy, which finds out what moves, needs no ranks
    from rawloop.dist import World


class Place(NamedTuple):
    """Where a buffer stands. A forward pass may put another tensor there, so it is looked up each time."""

    module: nn.Module
    key: str

    @property
    def buffer(self) -> Tensor:
        """The tensor that stands there now."""
        found = self.module._buffers[self.key]
        assert found is not None
        return found


def places(model: nn.Module) -> dict[str, Place]:
    """Where each buffer of a model stands, by name; one that stands in several places, the first of them."""
    found, seen = {}, set()
    for prefix, module in model.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and id(buffer) not in seen:
                seen.add(id(buffer))
                found[_joined(prefix, key)] = Place(module, key)
    return found


class Moves(NamedTuple):
    """What a training forward does to buffers: the names that it moves, and why some of them cannot be held.

    `twice` says that the backward pass moves them again, as it does where activations are recomputed. `caches` are
    written in each pass and follow from its batch alone; `attributes` are numbers and tensors of modules that move, and
    are no buffers.
    """

    moved: list[str]
    refused: dict[str, str]
    caches: list[str]
    attributes: list[str]
    twice: bool = False


class Trace:
    """The buffers of a model as they are now, to be compared with what becomes of them, and put back.

    So are numbers and tensors that are plain attributes of modules: where a buffer is a cache, one of them often says
    what is in it.
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
        """Buffers that were written, by name: where, why they cannot be held if they cannot, and whether they moved."""
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
        """Numbers and tensors of modules that have another value now."""
        return [
            _joined(prefix, name)
            for prefix, module, name, value in self.attributes
            if not _same(self.before[id(value)][2] if id(value) in self.before else value, vars(module).get(name))
        ]

    def put_back(self) -> None:
        """Give all of them the values that they had. What has not moved is not touched, what was made stays."""
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
    """The buffers that training moves: equal on all ranks after each update, and as before where there was none.

    Around each window of a loop: `begin`, the passes, then `agree` if the update was applied and `put_back` if not.
    Nothing waits for the device. Without names it does nothing.

    Args:
        model: what is trained.
        names: of the buffers that move, on all ranks the same.
        twice: whether the backward pass moves them as well.
        watched: others, of which none may move.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str] = (), twice: bool = False, watched: Sequence[str] = ()
    ) -> None:
        found = places(model)
        self.places = {name: found[name] for name in names}
        self.twice = twice
        self._watched = {name: found[name] for name in watched if name in found and name not in self.places}
        self._stamps: list[tuple[int, int]] = []
        self._before: list[Tensor] = []

    def begin(self) -> None:
        """Note the buffers as they are before a window."""
        self._before = self.values()
        self._stamps = self._now()

    def values(self) -> list[Tensor]:
        """Copies of the buffers as they are."""
        return [place.buffer.clone() for place in self.places.values()]

    def floats(self) -> list[Tensor]:
        """The buffers themselves, those of floats."""
        return [p.buffer for p in self.places.values() if p.buffer.is_floating_point()]

    def write(self, values: Sequence[Tensor]) -> None:
        """Write what `values` returned into the buffers."""
        with torch.no_grad():
            for place, value in zip(self.places.values(), values, strict=True):
                if place.buffer.shape == value.shape:  # its dtype may be another, after a fallback
                    place.buffer.copy_(value)

    def put_back(self) -> None:
        """Give them the values from before the window."""
        self.write(self._before)

    def agree(self, world: "World") -> None:
        """Make them equal over the ranks: floats become their mean, other numbers their maximum."""
        pairs = [(place.buffer, before) for place, before in zip(self.places.values(), self._before, strict=True)]
        # One of another shape is reported by `trouble`: the other ranks must not wait for this one.
        world.make_equal([now if _kind(now) == _kind(before) else before for now, before in pairs])

    def trouble(self) -> str | None:
        """What is wrong with what the window has done to buffers, if anything is, on this rank."""
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


def settle_moves(model: nn.Module, moves: Moves, world: "World", watch: bool) -> MovingBuffers:
    """Decide with all ranks which buffers training moves, from what a first batch moved on each. All ranks call this.

    Args:
        model: what is trained.
        moves: what this rank's first batch moved.
        world: the ranks.
        watch: look in each window whether others move.

    Raises:
        UserError: one of them cannot be held, on any rank.
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
    moved = {name for share in shares for name in share.moved}
    # PEFT keeps the modules of modules_to_save as they were beside those that run.
    unused = {m for module in model.modules() if hasattr(module, "original_module") for m in _inside(module)}
    norms = {name for name, place in places(model).items() if _is_norm(place) and place.module not in unused}
    caches = {name for share in shares for name in share.caches}
    names = [name for name in places(model) if name in moved or name in norms]
    watched = [name for name in places(model) if watch and name not in caches]
    return MovingBuffers(model, names, any(share.twice for share in shares), watched)


def _inside(module: nn.Module) -> Iterator[nn.Module]:
    original = module.original_module
    return original.modules() if isinstance(original, nn.Module) else iter(())


def _is_norm(place: Place) -> bool:
    """Whether BatchNorm's like moves it, in passes that reach it: those of the first batch need not."""
    return isinstance(place.module, _NormBase) and place.module.training and place.module.track_running_stats


def in_words(buffers: MovingBuffers, moves: Moves, beside: Mapping[str, str]) -> list[str]:
    """What the user should know, a sentence at a time.

    Args:
        buffers: those that move.
        moves: what was found with them.
        beside: those that an adapter's own file does not hold, and the modules that they are of.
    """
    lines = []
    if buffers.places:
        names = list(buffers.places)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        lines.append(
            f"training moves {len(names)} buffers ({', '.join(names[:3])}{more}): they are made equal over ranks after "
            "each update, put back where one is skipped, and kept in checkpoints"
        )
        if any(isinstance(place.module, _NormBase) for place in buffers.places.values()):
            lines[-1] += "; BatchNorm mixes the samples of a micro-batch, so that its size changes what is trained"
        if buffers.twice:
            lines[-1] += "; activations are recomputed, which moves them twice: the second time is undone"
    if beside:
        modules = ", ".join(dict.fromkeys(beside.values()))
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
