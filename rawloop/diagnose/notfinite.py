"""Finds where a loss or gradient that is not finite comes from, by running its batch again.

Nothing of this runs while all is finite.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rawloop.contracts import Batch

NAMED = 5  # samples that are named
BLOCKED = -1e4  # a mask that is added blocks what has this or less


def cause(
    model: nn.Module,
    batch: Batch,
    alone: Sequence[Batch],
    finite: Callable[[Batch], bool],
    plain: Callable[[Batch], bool] | None = None,
) -> str:
    """Say why a pass is not finite: damaged weights, or else which samples, which inputs, which module.

    Args:
        model: the raw model.
        batch: on the model's device.
        alone: the batch's samples, a batch for each; empty if they cannot be had.
        finite: runs the pass on a batch, and says whether its result is finite.
        plain: the same without autocast, where the model can do that.
    """
    damaged = _damaged(model)
    if damaged is not None:
        return damaged
    try:
        guilty = [one for one in alone if not finite(one)]
    except ValueError:  # BatchNorm takes no single value per channel in training
        alone, guilty = (), []
    suspect = guilty[0] if guilty else batch
    found = [_samples(batch, alone, guilty), *_inputs(suspect)]
    with _first_place(model) as place:
        finite(suspect)
    found += place()
    if plain is not None and plain(suspect):
        found.append("without autocast it is finite")
    return "; ".join(found)


def _damaged(model: nn.Module) -> str | None:
    """The first weight or buffer that is not finite. A buffer may hold minus infinity, as masks do."""
    for kind, named in (("weight", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in named:
            if "original_module." in name:  # PEFT keeps what modules_to_save replaces, and does not use it
                continue
            wrong = ~tensor.isfinite() if kind == "weight" else _not_a_mask(tensor)
            if bool(wrong.any()):
                return f"the {kind} '{name}' is not finite ({int(wrong.sum()):,} of {tensor.numel():,} numbers)"
    return None


def _not_a_mask(tensor: Tensor) -> Tensor:
    """Return where a tensor is NaN or plus infinity."""
    return tensor.isnan() | (tensor == math.inf)


def _samples(batch: Batch, alone: Sequence[Batch], guilty: Sequence[Batch]) -> str:
    if not alone:
        return f"in the batch of the samples {', '.join(batch.ids)}"
    if not guilty:
        return f"no sample alone gives it, only the samples {', '.join(batch.ids)} together"
    names = [name for one in guilty for name in one.ids]
    if len(names) == 1:
        return f"the sample {names[0]} alone gives it"
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"each of the samples {', '.join(names[:NAMED])}{more} gives it alone"


def _inputs(batch: Batch) -> list[str]:
    found = []
    for name, values in batch.inputs.items():
        if "mask" in name and (count := _blind(values)):
            found.append(f"nothing is to be seen in {count} row(s) of its '{name}'")
        elif _any(_not_a_mask, values):
            found.append(f"its input '{name}' is not finite")
    return found or ["all weights and inputs are finite"]


def _blind(mask: Tensor) -> int:
    """Return in how many rows of a mask, added or multiplied, everything is blocked."""
    blocked = mask <= BLOCKED if mask.is_floating_point() and bool((mask < 0).any()) else mask == 0
    return int(blocked.all(-1).sum())


@contextmanager
def _first_place(model: nn.Module) -> Iterator[Callable[[], list[str]]]:
    """While this is open, find the first module that turns finite numbers into others, forward, or else backward."""
    first: dict[str, str] = {}

    def watch(name: str) -> Callable[..., None]:
        def inspect(module: nn.Module, given: Any, named: Any, made: Any) -> None:
            inputs = [*_tensors((given, named))]
            for tensor in _tensors(made):
                if _any(_not_a_mask, tensor) and not any(_any(_not_a_mask, one) for one in inputs):
                    first.setdefault("forward", f"the first that is not finite is made by {name} ({_dtype(tensor)})")
                no_log = "forward" in first or any(_any(torch.isneginf, one) for one in inputs)
                if not no_log and _any(torch.isneginf, tensor):
                    first.setdefault("log", f"{name} makes minus infinity")
                if tensor.requires_grad:
                    tensor.register_hook(inspect_gradient)  # type: ignore[no-untyped-call]

        def inspect_gradient(gradient: Tensor) -> None:
            if not bool(gradient.isfinite().all()):
                where = f"what {name} gives ({_dtype(gradient)})"
                first.setdefault("backward", f"going back, the first gradient that is not finite is that of {where}")

        return inspect

    with ExitStack() as hooks:
        for name, part in model.named_modules():
            where = f"'{name}'" if name else "the model outside of its modules"
            hooks.callback(part.register_forward_hook(watch(where), with_kwargs=True).remove)
        otherwise = ["the model gives finite numbers, of which it is made afterwards"]
        yield lambda: [first[key] for key in ("log", "forward", "backward") if key in first] or otherwise


def _any(wrong: Callable[[Tensor], Tensor], tensor: Tensor) -> bool:
    return bool(wrong(tensor).any())


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in what a module takes or gives."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)
