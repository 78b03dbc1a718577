"""What a tape is made of: calls with references in place of tensors, leaves, and lines of the user's code."""

import linecache
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rawloop.errors import RawloopError
from rawloop.watch.nest import map_tensors

Call = Callable[..., Any]
Autocast = tuple[tuple[str, torch.dtype], ...]  # the devices with autocast on, and their dtypes
OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
IN_PLACE = {f"__i{name}__" for name in OPERATORS} | {"__setitem__"}


class NotReplayable(RawloopError):
    """A pass cannot run again; the message says why."""


class Ref(NamedTuple):
    """A tensor on the tape: a leaf by name, a weight by name, or the output number `item` of an entry."""

    kind: str
    name: str = ""
    entry: int = -1
    item: int = 0


class Line(NamedTuple):
    """A line of the user's code."""

    file: str = ""
    number: int = 0
    source: str = ""  # its text, if the file may be elsewhere

    def text(self) -> str:
        """Return the source text."""
        return self.source or linecache.getline(self.file, self.number).strip()

    def __str__(self) -> str:
        if not self.file:
            return ""
        text = self.text()
        return f"{self.file.rpartition('/')[2]}:{self.number}" + (f": {text}" if text else "")


class Ambience(NamedTuple):
    """The settings of torch under which an entry ran. `span` counts the outermost autocast contexts left so far."""

    span: int = 0
    autocast: Autocast = ()
    cache: bool = True
    grad: bool = True


@dataclass(slots=True)
class Entry:
    """One call. `function` is None for a call of the model, whose mode was `training`.

    `model` is the called model without DDP; None on a tape that was read from a file.
    """

    function: Call | None
    args: Any
    kwargs: Any
    line: Line
    ambience: Ambience
    training: bool = True
    model: nn.Module | None = None


@dataclass(slots=True)
class Leaf:
    """A tensor from outside, its version, and whether an entry writes to it: `tensor` is then a copy."""

    tensor: Tensor
    version: int
    written: bool = False


def refs_in(nest: Any) -> Iterator[Ref]:
    """Yield the references of a nest."""
    found: list[Ref] = []
    map_tensors(lambda ref: found.append(ref), nest, Ref)
    yield from found


def base_of(tensor: Tensor) -> Tensor:
    """Return the tensor whose memory a view shows, or the tensor itself."""
    return tensor if tensor._base is None else tensor._base


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was written to; -1 if torch does not count it."""
    return -1 if tensor.is_inference() else tensor._version


def writes(name: str) -> bool:
    """Whether an operation of this name writes to its first argument."""
    return name in IN_PLACE or (name[-1:] == "_" and name[-2:] != "__")
