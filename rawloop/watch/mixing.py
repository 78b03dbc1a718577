"""Which module carries later positions to earlier ones: modules are compared over two runs of a pass, by position."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rawloop.watch.nest import tensors_in

MOST_POSITIONS = 8
Pick = Callable[[Any], Iterator[Tensor]]
Call = tuple[str, list[Tensor], list[Tensor]]  # a module, and what it was given and has made at the positions


def first_mixer(model: nn.Module, pick: Pick, runs: Sequence[Callable[[], object]], tolerance: float) -> str:
    """Return the first module whose output moves at some positions while its inputs do not; empty if there is none.

    Args:
        model: the bare model.
        pick: yields the values of a nest at positions before those that differ between the runs.
        runs: two runs of a pass. They call the same modules in the same order.
        tolerance: the share of a module's largest output from which it has moved.
    """
    before, after = (_run(model, pick, run) for run in runs)
    for (name, given, made), (other, given_then, made_then) in zip(before, after, strict=False):
        if name != other:
            return ""  # a router has taken another way
        if _moved(made, made_then, tolerance) and not _moved(given, given_then, tolerance):
            return name
    return ""


def _run(model: nn.Module, pick: Pick, run: Callable[[], object]) -> list[Call]:
    """Return the calls in the order in which they end, so that an inner module comes before its owner."""
    kept: list[Call] = []

    def look(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            kept.append((name, [*pick((args, kwargs))], [*pick(output)]))

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.callback(module.register_forward_hook(partial(look, name), with_kwargs=True).remove)
        run()
    return kept


def at_positions(row: int, chosen: Sequence[int], rows: int, length: int, nest: Any) -> Iterator[Tensor]:
    """Yield the tensors of a nest that have rows and positions, at the chosen positions of a row; float32."""
    for _, tensor in tensors_in(nest):
        lengths = [dim for dim in range(1, tensor.dim()) if tensor.shape[dim] == length]
        if tensor.dim() and tensor.shape[0] == rows and len(lengths) == 1:
            positions = torch.tensor(chosen[:MOST_POSITIONS], device=tensor.device)
            yield tensor.detach()[row].index_select(lengths[0] - 1, positions).float()


def _moved(before: list[Tensor], after: list[Tensor], tolerance: float) -> bool:
    pairs = zip(before, after, strict=False)
    return any(bool((a - b).abs().amax() > tolerance * b.abs().amax()) for b, a in pairs if a.shape == b.shape)
