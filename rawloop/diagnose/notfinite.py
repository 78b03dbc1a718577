"""Finds the cause of a loss or gradient that is not finite by running its batch again."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rawloop.contracts import Batch

NAMED = 5  # samples in a message
BLOCKED = -1e4  # an additive mask blocks positions with this value or less


def cause(
    model: nn.Module,
    batch: Batch,
    alone: Sequence[Batch],
    finite: Callable[[Batch], bool],
    plain: Callable[[Batch], bool] | None = None,
) -> str:
    """Return why a pass is not finite: damaged weights, or else the samples, inputs and module that cause it.

    Args:
        model: the raw model.
        batch: the batch, on the model's device.
        alone: a batch for each of its samples; empty if unknown.
        finite: runs the pass on a batch, and returns whether the result is finite.
        plain: the same without autocast, if the model can run without it.
    """
    damaged = _damaged(model)
    if damaged is not None:
        return damaged
    try:
        guilty = [one for one in alone if not finite(one)]
    except ValueError:  # BatchNorm refuses a single value per channel in training
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
    """Return a message about the first weight or buffer that is not finite. Buffers may contain -inf, as masks do."""
    for kind, named in (("weight", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in named:
            if "original_module." in name:  # PEFT keeps the originals of modules_to_save without using them
                continue
            wrong = ~tensor.isfinite() if kind == "weight" else _not_a_mask(tensor)
            if bool(wrong.any()):
                return f"the {kind} '{name}' is not finite ({int(wrong.sum()):,} of {tensor.numel():,} numbers)"
    return None


def _not_a_mask(tensor: Tensor) -> Tensor:
    """Return where a tensor is NaN or +inf."""
    return tensor.isnan() | (tensor == math.inf)


def _samples(batch: Batch, alone: Sequence[Batch], guilty: Sequence[Batch]) -> str:
    if not alone:
        return f"in the batch of the samples {', '.join(batch.ids)}"
    if not guilty:
        return f"no sample alone causes it, only the samples {', '.join(batch.ids)} together"
    names = [name for one in guilty for name in one.ids]
    if len(names) == 1:
        return f"the sample {names[0]} alone causes it"
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"each of the samples {', '.join(names[:NAMED])}{more} causes it alone"


def _inputs(batch: Batch) -> list[str]:
    found = []
    for name, values in batch.inputs.items():
        if "mask" in name and (count := _blind(values)):
            found.append(f"{count} row(s) of its '{name}' mask every position")
        elif _any(_not_a_mask, values):
            found.append(f"its input '{name}' is not finite")
    return found or ["all weights and inputs are finite"]


def _blind(mask: Tensor) -> int:
    """Return how many rows of a mask, additive or multiplied, block every position."""
    blocked = mask <= BLOCKED if mask.is_floating_point() and bool((mask < 0).any()) else mask == 0
    return int(blocked.all(-1).sum())


@contextmanager
def _first_place(model: nn.Module) -> Iterator[Callable[[], list[str]]]:
    """Watch the passes inside for the first module with finite inputs and an output or gradient that is not finite."""
    first: dict[str, str] = {}

    def watch(name: str) -> Callable[..., None]:
        def inspect(module: nn.Module, given: Any, named: Any, made: Any) -> None:
            inputs = [*_tensors((given, named))]
            for tensor in _tensors(made):
                if _any(_not_a_mask, tensor) and not any(_any(_not_a_mask, one) for one in inputs):
                    said = f"the first that is not finite is the output of {name} ({_dtype(tensor)})"
                    first.setdefault("forward", said)
                no_log = "forward" in first or any(_any(torch.isneginf, one) for one in inputs)
                if not no_log and _any(torch.isneginf, tensor):
                    first.setdefault("log", f"the output of {name} has minus infinity")
                if tensor.requires_grad:
                    tensor.register_hook(inspect_gradient)  # type: ignore[no-untyped-call]

        def inspect_gradient(gradient: Tensor) -> None:
            if not bool(gradient.isfinite().all()):
                where = f"the output of {name} ({_dtype(gradient)})"
                first.setdefault("backward", f"in backward, the first gradient that is not finite is that of {where}")

        return inspect

    with ExitStack() as hooks:
        for name, part in model.named_modules():
            where = f"'{name}'" if name else "the model outside its modules"
            hooks.callback(part.register_forward_hook(watch(where), with_kwargs=True).remove)
        otherwise = ["the model's output is finite, and the loss computed from it is not"]
        yield lambda: [first[key] for key in ("log", "forward", "backward") if key in first] or otherwise


def _any(wrong: Callable[[Tensor], Tensor], tensor: Tensor) -> bool:
    return bool(wrong(tensor).any())


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors in a module's inputs or outputs."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)
