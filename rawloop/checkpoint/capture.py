"""Takes the state of a run's parts, on every rank, as it stands at one step.

Asynchronous saves copy the state to host memory, reusing the buffers of the last save.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from rawloop.checkpoint.manifest import NAME, installed_versions
from rawloop.checkpoint.pack import NOTHING, Packed, pack
from rawloop.checkpoint.writer import STATE, Contents
from rawloop.contracts import FolderState, Stateful
from rawloop.dist import World
from rawloop.errors import UserError
from rawloop.host_memory import wait_for_copies


class Parts:
    """The parts of a run by name: `folders` write their own files; of `states`, `per_rank` differ between ranks.

    A part that differs has `per_rank = True`, and `start_afresh(step)` for a rank that the checkpoint has no state of.

    Raises:
        UserError: a part is none, or its state cannot be stored; says what to wrap it in.
    """

    def __init__(self, state: Mapping[str, Stateful | FolderState]) -> None:
        if not isinstance(state, Mapping):
            raise UserError(
                f"the parts of a checkpoint are a {type(state).__name__}: hand in a dict of them by name, such as "
                '{"model": model}'
            )
        for name, part in state.items():
            wrong = _wrong_name(name, bool(getattr(part, "per_rank", False))) or _wrong_part(part)
            if wrong:
                raise UserError(f"the part {name!r} of a checkpoint {wrong}")
        self.folders = {name: part for name, part in state.items() if isinstance(part, FolderState)}
        self.states = {name: part for name, part in state.items() if isinstance(part, Stateful)}
        self.per_rank: dict[str, Any] = {n: part for n, part in self.states.items() if getattr(part, "per_rank", False)}
        homes = [part.folder for part in self.folders.values()]
        for kind, names in (("name", [*self.states]), ("folder", [STATE, NAME, *homes])):
            lower = [name.lower() for name in names]  # some file systems know no difference
            if len(set(lower)) < len(lower):
                raise UserError(f"two parts of a checkpoint have the same {kind}: {names}")
        if not state:
            raise UserError("a checkpoint has no parts: hand in the model and whatever else is to come back")


def _wrong_name(name: object, per_rank: bool) -> str | None:
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
        return "has a name that is none of a file: use letters, digits, '_', '-' and '.', such as 'optimizer'"
    if not per_rank and re.search(r"-\d{5}$", name):
        return "has the name of another part's state on one rank: give it another"
    return None


def _wrong_part(part: Any) -> str | None:
    """Say what is wrong with a part, and how to mend it."""
    what = f"is {part!r}" if part is None or isinstance(part, type) else f"is a {type(part).__name__}"
    stateful, folder = isinstance(part, Stateful), isinstance(part, FolderState)
    if part is None:
        return f"{what}: leave it out"
    if isinstance(part, type):
        return f"{what}, a class: hand in the object"
    if isinstance(part, Optimizer):
        return (
            f"{what}, whose state goes by position, not by name: hand in rawloop.NamedOptimizerState(optimizer, "
            "named), where named() gives (name, parameter) of what it holds, such as model.named_parameters"
        )
    if isinstance(part, LRScheduler):
        return (
            f"{what}, whose state does not have the learning rate that it has set: hand in "
            "rawloop.SchedulerState(scheduler), and rawloop.NamedOptimizerState of its optimizer, which has it"
        )
    if stateful and folder:
        return f"{what} with state_dict and with snapshot: it must have one of them"
    if not stateful and not folder:
        return (
            f"{what}: hand in an object with state_dict() and load_state_dict(state), or with folder, snapshot(copy) "
            "and load(folder); of a number, an object that holds it"
        )
    if folder:
        wrong = _wrong_name(part.folder, True)
        return f"{what}, whose folder {wrong}" if wrong else None
    if getattr(part, "per_rank", False) and not hasattr(part, "start_afresh"):
        return f"{what} with per_rank, and without start_afresh(step), for a rank that the checkpoint has no state of"
    state = part.state_dict()
    try:
        pack(state, dry=True)
    except TypeError as error:
        return f"{what}, whose {error}"
    return None


class Capture:
    """Takes `Contents` of the parts; a copy of them, if the parts go on changing while it is written."""

    def __init__(self, parts: Parts, world: World, *, copy: bool) -> None:
        self.parts, self.world, self.copy = parts, world, copy
        self.versions = installed_versions()
        self._copies: dict[str, Packed] = {}  # of the last save; the next is written over them

    def take(self, step: int, settle: Callable[[], None]) -> Contents:
        """Take the state of all parts on all ranks. Errors are raised on all of them.

        `settle` is called on rank 0 before an earlier copy is written over.
        """
        states = self.world.on_all_ranks(partial(self._collect, settle))
        assert states is not None
        every_rank = self.world.gather((step, {name: states[name] for name in self.parts.per_rank}))
        steps = [rank_step for rank_step, _ in every_rank]
        assert steps == [step] * self.world.size, f"ranks save different steps: {steps}"
        shared = {name: packed for name, packed in states.items() if name not in self.parts.per_rank}
        folders = self.world.on_all_ranks(self._snapshots, only_main=True)
        return Contents(step, self.versions, shared, [own for _, own in every_rank], folders or {})

    def _snapshots(self) -> dict[str, tuple[str, Callable[[Path], None]]]:
        return {name: (part.folder, part.snapshot(self.copy)) for name, part in self.parts.folders.items()}

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
        wait_for_copies()
        return self._copies
