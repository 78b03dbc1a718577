"""Takes the state of a run's parts, on every rank, as it stands at one step.

Where saving is asynchronous it is a copy in host memory, which is written over the one before.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol, cast

from rawloop.checkpoint.manifest import installed_versions
from rawloop.checkpoint.pack import NOTHING, Packed, pack
from rawloop.checkpoint.writer import STATE, Contents
from rawloop.contracts import FolderState, Stateful
from rawloop.dist import World


class PerRank(Stateful, Protocol):
    """A part whose state differs from rank to rank (random streams): it has `per_rank = True`."""

    per_rank: bool

    def start_afresh(self, step: int) -> None:
        """Derive a state for a rank that the checkpoint has none of, because the world was smaller."""
        ...


class Parts:
    """The parts of a run by name: `folders` write their own files; of `states`, `per_rank` differ between ranks."""

    def __init__(self, state: Mapping[str, Stateful | FolderState]) -> None:
        self.folders = {name: part for name, part in state.items() if isinstance(part, FolderState)}
        self.states = {name: part for name, part in state.items() if isinstance(part, Stateful)}
        self.per_rank = {
            name: cast(PerRank, part) for name, part in self.states.items() if getattr(part, "per_rank", False)
        }
        _check_names(state, [part.folder for part in self.folders.values()])


def _check_names(state: Mapping[str, Stateful | FolderState], homes: list[str]) -> None:
    for name in [*state, *homes]:
        assert re.fullmatch(r"\w[\w.-]*", name), f"{name!r} cannot be the name of a file"
    assert len({*homes, STATE}) == len(homes) + 1, f"folders of parts must differ: {homes}"
    for name, part in state.items():
        kinds = isinstance(part, Stateful) + isinstance(part, FolderState)
        assert kinds == 1, f"{name!r} must be Stateful or a FolderState, and not both: {type(part)}"


class Capture:
    """Takes `Contents` of the parts; a copy of them, if the parts go on changing while it is written."""

    def __init__(self, parts: Parts, world: World, *, copy: bool) -> None:
        self.parts, self.world, self.copy = parts, world, copy
        self.versions = installed_versions()
        self._taken: Contents | None = None
        self._copies: dict[str, Packed] = {}  # of the last save; the next is written over them

    def take(self, step: int, settle: Callable[[], None]) -> Contents:
        """Take the state of all parts on all ranks; two slots of one step hold the same, and share the copy.

        `settle` is called on rank 0 before an earlier copy is written over. Errors are raised on all ranks.
        """
        there = self._taken is not None and self._taken.step == step
        if self.world.from_main(there):  # rank 0 lets go of it once it is written
            assert there
            return cast(Contents, self._taken)
        self._taken = None  # one copy at a time
        states = self.world.together(partial(self._collect, settle))
        assert states is not None
        every_rank = self.world.gather((step, {name: states[name] for name in self.parts.per_rank}))
        steps = [rank_step for rank_step, _ in every_rank]
        assert steps == [step] * self.world.size, f"ranks save different steps: {steps}"
        shared = {name: packed for name, packed in states.items() if name not in self.parts.per_rank}
        folders = {}
        if self.world.is_main:
            folders = {name: (part.folder, part.snapshot(self.copy)) for name, part in self.parts.folders.items()}
        taken = Contents(step, {}, self.versions, shared, [own for _, own in every_rank], folders)
        self._taken = taken if self.copy else None
        return taken

    def _collect(self, settle: Callable[[], None]) -> dict[str, Packed]:
        """Take the state of every part; packing it copies from the device, so other ranks pack only their own."""
        if self.world.is_main:
            settle()
        states = {name: part.state_dict() for name, part in self.parts.states.items()}
        wanted = states if self.world.is_main else self.parts.per_rank
        if not self.copy:
            return {name: pack(states[name]) for name in wanted}
        spare = {name: packed.tensors for name, packed in self._copies.items()}
        self._copies = {}  # one that is half written over is of no use to anybody
        self._copies = {name: pack(states[name], copy=True, spare=spare.get(name, NOTHING)) for name in wanted}
        return self._copies

    def let_go(self) -> None:
        """Drop what was taken last; its copies are kept to be written over."""
        self._taken = None
