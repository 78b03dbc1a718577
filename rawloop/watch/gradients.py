"""Activations against their dtype, and gradients over depth."""

import math
from collections.abc import Iterable, Iterator
from itertools import pairwise

import torch
from torch import nn

from rawloop.watch.findings import Cause, Finding, Place
from rawloop.watch.look import Look, Seen
from rawloop.watch.subject import Detector, StepRecord, Subject

LEAST_HEADROOM = 3.0  # bits between a module's outputs and the largest number of their dtype
FEWEST_LAYERS = 4  # of a stack that is judged over depth
MOST_CHANGE = 10.0  # of the largest gradient from one end of a stack to the other, in bits


class Gradients(Detector):
    """Judges the magnitudes of outputs and gradients, module by module."""

    def __init__(self, look: Look) -> None:
        self.look = look
        self._told: set[str] = set()

    def end(self, subject: Subject, record: StepRecord) -> Iterable[Finding]:
        """Judge what the look has seen."""
        seen = self.look.seen(record)
        if seen is not None:
            yield from self._headroom(subject, seen)
            yield from self._depth(subject, seen)

    def _headroom(self, subject: Subject, seen: Seen) -> Iterator[Finding]:
        tight = [item for item in seen.outputs.items() if item[1].headroom < LEAST_HEADROOM]
        tight = [(name, amounts) for name, amounts in tight if name not in self._told]
        if not tight:
            return
        self._told |= {name for name, _ in tight}
        name, amounts = min(tight, key=lambda item: round(item[1].headroom, 1))
        limit, dtype, bits = torch.finfo(amounts.dtype).max, str(amounts.dtype).removeprefix("torch."), amounts.headroom
        cause = Cause(
            "precision",
            f"the largest output of '{name}' is {amounts.largest:.4g}, {bits:.1f} bits below the limit of {dtype}",
            Place("forward", module=name),
            {"largest": amounts.largest, "limit": limit, "head room in bits": round(bits, 1), "modules": len(tight)},
            f"Compute '{name}' in float32 or bfloat16, or take a mode of a larger range than {dtype}",
        )
        others = f", and {len(tight) - 1} more modules" if len(tight) > 1 else ""
        what = f"outputs come close to the limit of {dtype}{others}"
        yield Finding("headroom", what, (cause,), seen.step, subject.world.rank)

    def _depth(self, subject: Subject, seen: Seen) -> Iterator[Finding]:
        """Gradients flow from the last layer to the first: name the layer through which they change most."""
        for stack, module in subject.model.named_modules():
            if not isinstance(module, nn.ModuleList | nn.Sequential) or stack in self._told:
                continue
            layers = layer_sizes(stack, module, seen)
            bits = {name: math.log2(below / size) for (_, below), (name, size) in pairwise(layers.items())}
            change = sum(bits.values())
            if len(layers) < FEWEST_LAYERS or abs(change) <= MOST_CHANGE:
                continue
            self._told.add(stack)
            begins = (min if change < 0 else max)(bits, key=lambda name: bits[name])
            (first, at_first), *_, (last, at_last) = layers.items()
            cause = Cause(
                "model",
                f"from '{last}' to '{first}' the largest gradient goes from {at_last:.3g} to {at_first:.3g}; it "
                f"changes most through '{begins}'",
                Place("backward", module=begins),
                {"first layer": at_first, "last layer": at_last, "bits through this layer": bits[begins]},
                f"Look at the initial weights, the residual path and the norm of '{begins}'",
            )
            how, name = "vanish" if change < 0 else "explode", stack or type(subject.model).__name__
            what = f"the gradients {how} over the {len(layers)} layers of '{name}'"
            yield Finding("gradients_over_depth", what, (cause,), seen.step, subject.world.rank)


def layer_sizes(stack: str, module: nn.Module, seen: Seen) -> dict[str, float]:
    """Return the largest gradient of each layer of a stack, in its order; empty unless all are alike and have one."""
    layers = {f"{stack}.{key}" if stack else key: child for key, child in module.named_children()}
    layers = {name: child for name, child in layers.items() if any(True for _ in child.parameters())}
    sizes = dict.fromkeys(layers, 0.0)
    for name, grad in seen.gradients.items():
        layer = next((layer for layer in layers if name.startswith(f"{layer}.")), None)
        if layer is not None and grad is not None:
            sizes[layer] = max(sizes[layer], grad.largest)
    alike = len({type(child) for child in layers.values()}) == 1
    return sizes if alike and all(0 < size < math.inf for size in sizes.values()) else {}
