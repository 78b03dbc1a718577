"""A tape as state that files can hold, so that its passes run again in another process."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.overrides import get_overridable_functions, resolve_name

from rawloop.errors import RawloopError
from rawloop.watch.marks import Ambience, Entry, Leaf, Line, Ref
from rawloop.watch.tape import Replay, Tape

FACTORIES = "arange empty eye full linspace logspace ones rand randint randn randperm scalar_tensor tensor zeros"
NAMED: dict[str, Any] = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


def tape_state(tape: Tape) -> dict[str, Any]:
    """Return a tape as nested dicts of tensors and JSON values, as `rawloop.pack` stores them.

    Raises:
        RawloopError: an entry has a function or an argument that cannot be stored, or nothing can run again.
    """
    if reason := tape.spoiled:
        raise RawloopError(f"the tape cannot be stored: {reason}")
    return {
        "entries": [_entry_state(entry) for entry in tape.entries],
        "leaves": {name: {"tensor": leaf.tensor, "written": leaf.written} for name, leaf in tape.leaves.items()},
        "stretches": [{"start": start, "rng": rng} for start, rng in tape.stretches],
        "passes": [
            {
                "roots": [[_encoded(root, ""), _encoded(grad, "")] for root, grad in replay.roots],
                "stretch": replay.stretch,
                "stop": replay.stop,
                "leaves": replay.num_leaves,
                "broken": replay.why_not(),
            }
            for replay in tape.replays
        ],
    }


def tape_from_state(state: Mapping[str, Any], model: nn.Module) -> Tape:
    """Return a tape, whose `replays` run with a model that has the same weights by name.

    Raises:
        RawloopError: the state has a function that this torch does not know, or another mark.
    """
    tape = Tape(model)
    tape.entries = [_entry(entry) for entry in state["entries"]]
    for name, leaf in state["leaves"].items():
        tape.leaves[name] = Leaf(leaf["tensor"], leaf["tensor"]._version, leaf["written"])
    tape.stretches = [(one["start"], one["rng"]) for one in state["stretches"]]
    for one in state["passes"]:
        roots = [(_decoded(root), _decoded(grad)) for root, grad in one["roots"]]
        tape.replays.append(Replay(tape, roots, one["stretch"], one["stop"], one["leaves"], one["broken"]))
    return tape


def _entry_state(entry: Entry) -> dict[str, Any]:
    ambience = entry.ambience
    return {
        "function": None if entry.function is None else _name_of(entry.function, entry.line),
        "args": _encoded(entry.args, str(entry.line)),
        "kwargs": _encoded(entry.kwargs, str(entry.line)),
        "line": [entry.line.file, entry.line.number, entry.line.text()],
        "span": ambience.span,
        "autocast": [[device, str(dtype).removeprefix("torch.")] for device, dtype in ambience.autocast],
        "cache": ambience.cache,
        "grad": ambience.grad,
        "training": entry.training,
    }


def _entry(state: Mapping[str, Any]) -> Entry:
    autocast = tuple((device, getattr(torch, dtype)) for device, dtype in state["autocast"])
    return Entry(
        None if state["function"] is None else _function(state["function"]),
        _decoded(state["args"]),
        _decoded(state["kwargs"]),
        Line(*state["line"]),
        Ambience(state["span"], autocast, state["cache"], state["grad"]),
        state["training"],
    )


def _name_of(function: Callable[..., Any], line: Line) -> str:
    name = resolve_name(function) or f"torch.{getattr(function, '__name__', '')}"
    if _functions().get(name) != function:
        raise RawloopError(f"the tape cannot be stored: {line} calls {function}, which has no name in torch")
    return str(name)


def _function(name: str) -> Callable[..., Any]:
    if name not in _functions():
        raise RawloopError(f"the tape calls '{name}', which this torch ({torch.__version__}) does not have")
    return _functions()[name]


@lru_cache(maxsize=1)
def _functions() -> dict[str, Callable[..., Any]]:
    """Return torch's overridable functions, operators and makers of tensors by name. No other function is looked up."""
    found = [function for group in get_overridable_functions().values() for function in group]
    found += [getattr(torch, name) for name in FACTORIES.split()]
    operators = torch._C._VariableFunctions
    named = {f"torch.{name}": getattr(operators, name) for name in dir(operators) if _takes_tensors(name)}
    return named | {name: function for function in found if (name := resolve_name(function)) is not None}


def _takes_tensors(operator: str) -> bool:
    """Whether all forms of an operator work on tensors that they are given: not on addresses, files or unsafe ids."""
    schemas = torch._C._jit_get_schemas_for_operator(f"aten::{operator}")
    firsts = [str(schema.arguments[0].type) if schema.arguments else "" for schema in schemas]
    checked = not any("unsafe" in str(schema) for schema in schemas)
    return bool(firsts) and checked and all(first in ("Tensor", "List[Tensor]") for first in firsts)


def _encoded(value: Any, line: str) -> Any:
    """Return an argument as JSON values, with marks for what JSON does not have."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Ref):
        return {"ref": list(value)}
    if type(value) in (list, tuple, torch.Size):
        kind = "list" if type(value) is list else "tuple"
        return {kind: [_encoded(item, line) for item in value]}
    if type(value) is dict and all(type(key) is str for key in value):
        return {"dict": {key: _encoded(item, line) for key, item in value.items()}}
    if isinstance(value, slice):
        return {"slice": [_encoded(item, line) for item in (value.start, value.stop, value.step)]}
    if value is ...:
        return {"ellipsis": True}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    for mark, named in NAMED.items():
        if isinstance(value, named):
            return {mark: str(value).removeprefix("torch.")}
    raise RawloopError(f"the tape cannot be stored: {line} has an argument of type {type(value).__qualname__}")


def _decoded(state: Any) -> Any:
    if not isinstance(state, dict):
        return state
    ((mark, value),) = state.items()
    if mark in NAMED:
        found = getattr(torch, value, None)
        if isinstance(found, NAMED[mark]):
            return found
    readers: dict[str, Callable[[Any], Any]] = {
        "ref": lambda v: Ref(*v),
        "list": lambda v: [_decoded(item) for item in v],
        "tuple": lambda v: tuple(_decoded(item) for item in v),
        "dict": lambda v: {key: _decoded(item) for key, item in v.items()},
        "slice": lambda v: slice(*(_decoded(item) for item in v)),
        "ellipsis": lambda v: ...,
        "device": torch.device,
        "complex": lambda v: complex(*v),
    }
    if mark not in readers:
        raise RawloopError(f"the tape has the mark '{mark}' with {value!r}, which this version does not know")
    return readers[mark](value)
