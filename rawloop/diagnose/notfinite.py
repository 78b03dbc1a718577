"""Finds the cause of a loss or gradient that is not finite by running its batch again."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from rawloop.contracts import Batch
from rawloop.origin import Origin, damaged, find_origin, is_finite, is_finite_in, reason

NAMED = 5  # samples in a message
BLOCKED = -1e4  # an additive mask blocks positions with this value or less


def cause(
    model: nn.Module, batch: Batch, alone: Sequence[Batch], run: Callable[[Batch], Tensor], backward: bool = False
) -> str:
    """Return why a pass is not finite: damaged weights, or else the samples, inputs and operation that cause it.

    Args:
        model: the raw model.
        batch: the batch, on the model's device.
        alone: a batch for each of its samples; empty if unknown.
        run: the forward pass on a batch; it returns the loss.
        backward: the loss is finite, and its gradients are not.
    """
    damage = damaged(model)
    if damage is not None:
        return str(damage)
    suspect, found = _suspect(batch, alone, lambda one: is_finite(partial(run, one), model, backward))
    again = partial(run, suspect)
    origin = find_origin(again, model, {f"the input '{name}'": one for name, one in suspect.inputs.items()})
    found += [] if origin is None else [_place(origin)]
    if origin is not None and origin.narrow is not None and is_finite_in(again, model, torch.float32):
        found.append("without autocast, in float32, it is finite")
    return "; ".join(found)


def cause_in_samples(batch: Batch, alone: Sequence[Batch], run: Callable[[Batch], Tensor]) -> str:
    """Return the samples and inputs that make a loss not finite, by forward passes alone; see `cause`."""
    return "; ".join(_suspect(batch, alone, lambda one: bool(run(one).isfinite()))[1])


def _suspect(batch: Batch, alone: Sequence[Batch], finite: Callable[[Batch], bool]) -> tuple[Batch, list[str]]:
    """Return a batch that is not finite, as small as possible, and what is found of samples and inputs."""
    try:
        guilty = [one for one in alone if not finite(one)]
    except ValueError:  # BatchNorm refuses a single value per channel in training
        alone, guilty = (), []
    suspect = guilty[0] if guilty else batch
    return suspect, [_samples(batch, alone, guilty), *_inputs(suspect)]


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
        elif "mask" not in name and not bool(values.isfinite().all()):
            found.append(f"its input '{name}' is not finite")
    return found or ["all weights and inputs are finite"]


def _blind(mask: Tensor) -> int:
    """Return how many rows of a mask, additive or multiplied, block every position."""
    blocked = mask <= BLOCKED if mask.is_floating_point() and bool((mask < 0).any()) else mask == 0
    return int(blocked.all(-1).sum())


def _place(origin: Origin) -> str:
    """Return where the first number that is not finite comes from, and why."""
    spot, why = origin.spot, reason(origin).what
    dtype = str(origin.dtype).removeprefix("torch.")
    line = f" ({spot.line})" if spot.line else ""
    if origin.phase == "backward":
        where = f"'{spot.module}'" if spot.module else "the model outside its modules" if spot.inside else "the loss"
        return f"in backward, the first gradient that is not finite ({dtype}) is made in {where}: {why}{line}"
    if origin.given:
        return why
    if not spot.inside:
        return f"the model's output is finite, and the loss computed from it is not: {why}{line}"
    where = f"the output of '{spot.module}'" if spot.module else "made by the model outside its modules"
    return f"the first that is not finite is {where} ({dtype}): {why}{line}"
