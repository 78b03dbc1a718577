"""Which module carries later positions to earlier ones: modules are compared over two runs of a pass, by position."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rawloop.watch.nest import tensors_in

MOST_POSITIONS = 8
Call = tuple[str, list[Tensor], list[Tensor]]  # a module, and what it was given and has made at the positions


class Positions(NamedTuple):
    """Some positions of one row of a batch: of `length` positions, `chosen`."""

    row: int
    rows: int
    length: int
    chosen: Sequence[int]


def first_mixer(model: nn.Module, at: Positions, runs: Sequence[Callable[[], object]], tolerance: float) -> str:
    """Return the first module whose output moves at some positions while its inputs do not; empty if there is none.

    Args:
        model: the bare model.
        at: positions before those that differ between the runs.
        runs: two runs of a pass. They call the same modules in the same order.
        tolerance: the share of a module's largest output from which it has moved.
    """
    before, after = (_run(model, at, run) for run in runs)
    for (name, given, made), (other, given_then, made_then) in zip(before, after, strict=False):
        if name != other:
            return ""  # a router has taken another way
        if _moved(made, made_then, tolerance) and not _moved(given, given_then, tolerance):
            return name
    return ""


def _run(model: nn.Module, at: Positions, run: Callable[[], object]) -> list[Call]:
    """Return the calls in the order in which they end, so that an inner module comes before its owner."""
    kept: list[Call] = []

    def look(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            kept.append((name, [*_at((args, kwargs), at)], [*_at(output, at)]))

    hooks = [m.register_forward_hook(partial(look, name), with_kwargs=True) for name, m in model.named_modules()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return kept


def _at(nest: Any, at: Positions) -> Iterator[Tensor]:
    """Yield the tensors of a nest that have rows and positions, at the positions."""
    for _, tensor in tensors_in(nest):
        lengths = [dim for dim in range(1, tensor.dim()) if tensor.shape[dim] == at.length]
        if tensor.dim() and tensor.shape[0] == at.rows and len(lengths) == 1:
            chosen = torch.tensor(at.chosen[:MOST_POSITIONS], device=tensor.device)
            yield tensor.detach()[at.row].index_select(lengths[0] - 1, chosen).float()


def _moved(before: list[Tensor], after: list[Tensor], tolerance: float) -> bool:
    pairs = zip(before, after, strict=False)
    return any(bool((a - b).abs().amax() > tolerance * b.abs().amax()) for b, a in pairs if a.shape == b.shape)
