"""The parts of a checkpoint: the objects that it saves and restores, by name."""

import re
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from rawloop.checkpoint.slots import MANIFEST, STATE
from rawloop.contracts import FolderState, Stateful
from rawloop.errors import UserError
from rawloop.pack import pack


class Parts:
    """The parts of a run by name. `folders` write their own files; of `states`, those in `per_rank` differ by rank.

    A part that differs by rank has `per_rank = True`, and `start_afresh(step)` for a rank without a stored state.

    Raises:
        UserError: an object is no part, or its state cannot be stored; the message says what to wrap it in.
    """

    def __init__(self, state: Mapping[str, Stateful | FolderState]) -> None:
        if not isinstance(state, Mapping):
            raise UserError(
                f"the parts of a checkpoint are a {type(state).__name__}: hand in a dict of them by name, such as "
                '{"model": model}'
            )
        if not state:
            raise UserError("a checkpoint has no parts: hand in the model and everything else to restore")
        for name, part in state.items():
            wrong = _wrong_name(name, bool(getattr(part, "per_rank", False))) or _wrong_part(part)
            if wrong:
                raise UserError(f"the part {name!r} of a checkpoint {wrong}")
        self.folders = {name: part for name, part in state.items() if isinstance(part, FolderState)}
        self.states = {name: part for name, part in state.items() if isinstance(part, Stateful)}
        self.per_rank: dict[str, Any] = {n: part for n, part in self.states.items() if getattr(part, "per_rank", False)}
        folders = [STATE, MANIFEST, *(part.folder for part in self.folders.values())]
        for kind, names in (("name", [*self.states]), ("folder", folders)):
            if len({name.lower() for name in names}) < len(names):  # some file systems ignore case
                raise UserError(f"two parts of a checkpoint have the same {kind}: {names}")


def _wrong_name(name: object, per_rank: bool) -> str | None:
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
        return "has a name that no file can have: use letters, digits, '_', '-' and '.', such as 'optimizer'"
    if not per_rank and re.search(r"-\d{5}$", name):
        return "has the name of another part's state on one rank: rename it"
    return None


def _wrong_part(part: Any) -> str | None:
    """Say what is wrong with a part, and how to fix it."""
    what = f"is {part!r}" if part is None or isinstance(part, type) else f"is a {type(part).__name__}"
    stateful, folder = isinstance(part, Stateful), isinstance(part, FolderState)
    if part is None:
        return f"{what}: leave it out"
    if isinstance(part, type):
        return f"{what}, a class: hand in the object"
    if isinstance(part, Optimizer):
        return (
            f"{what}, whose state goes by position, not by name: hand in rawloop.NamedOptimizerState(optimizer, "
            "named), where named() gives the (name, parameter) pairs of its parameters, such as model.named_parameters"
        )
    if isinstance(part, LRScheduler):
        return (
            f"{what}, whose state lacks the learning rate that it has set: hand in rawloop.SchedulerState(scheduler), "
            "and rawloop.NamedOptimizerState of its optimizer, which stores the learning rate"
        )
    if stateful == folder:
        return (
            f"{what}: hand in an object with state_dict() and load_state_dict(state), or with folder, snapshot(copy) "
            "and load(folder), but not with both; wrap a number in such an object"
        )
    if folder:
        wrong = _wrong_name(part.folder, True)
        return f"{what}, whose folder {wrong}" if wrong else None
    if getattr(part, "per_rank", False) and not hasattr(part, "start_afresh"):
        return f"{what} with per_rank, but without start_afresh(step), which is called on a rank without a stored state"
    state = part.state_dict()
    try:
        pack(state, dry=True)
    except TypeError as error:
        return f"{what}, whose {error}"
    return None
