"""Buffers that training changes ("moves"), such as the running means of BatchNorm.

They matter as much as weights, but no optimizer, all-reduce or adapter file handles them. One pass before training
finds them by comparison (`buffers.py`).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from rawloop.buffers import Moves, kind_of, places
from rawloop.dist import World
from rawloop.errors import UserError, first_few


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
        world.make_equal([now if kind_of(now) == kind_of(before) else before for now, before in pairs])

    def problem(self) -> str | None:
        """Return what is wrong with this rank's buffers after a window, or None."""
        for (name, place), before in zip(self.places.items(), self._before, strict=True):
            if place.buffer.shape != before.shape:
                return f"has changed the buffer {name} from {kind_of(before)} to {kind_of(place.buffer)}"
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
