"""Activations and gradients against their dtype: head room, gradients over depth, accumulation in 16 bits."""

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise

import torch
from torch import nn

from rawloop.watch.findings import Cause, Finding, Place
from rawloop.watch.look import Looking, Seen
from rawloop.watch.measure import GradientAmounts
from rawloop.watch.subject import StepRecord, Subject

LEAST_HEADROOM = 3.0  # bits between a module's outputs and the largest number of their dtype
FEWEST_LAYERS = 4  # of a stack that is judged over depth
MOST_CHANGE = 10.0  # of the largest gradient from one end of a stack to the other, in bits
MANY_MICRO_STEPS = 32
SIGNIFICAND = {torch.bfloat16: 8, torch.float16: 11}  # bits, with the leading one
Gradient = GradientAmounts | None


class Gradients(Looking):
    """Looks at the magnitudes of outputs and gradients, module by module."""

    def gradients(self, subject: Subject, record: StepRecord) -> Iterable[Finding]:
        """Measure, and judge what the accumulation of this window has lost."""
        self.look.gradients(subject, record)
        return self._accumulation(subject, record)

    def end(self, subject: Subject, record: StepRecord) -> Iterable[Finding]:
        """Judge what the look has seen."""
        seen = self.look.seen(record)
        if seen is not None:
            yield from self._headroom(subject, seen)
            yield from self._depth(subject, seen)

    def _headroom(self, subject: Subject, seen: Seen) -> Iterator[Finding]:
        outputs = [item for item in seen.outputs.items() if item[0] not in self._told]
        tight = sorted((round(a.headroom, 1), n) for n, (_, a) in enumerate(outputs) if a.headroom < LEAST_HEADROOM)
        if not tight:
            return
        self._told |= {outputs[n][0] for _, n in tight}
        bits, (name, amounts) = tight[0][0], outputs[tight[0][1]]
        limit, dtype = torch.finfo(amounts.dtype).max, _short(amounts.dtype)
        others = f", and {len(tight) - 1} more modules" if len(tight) > 1 else ""
        cause = Cause(
            "precision",
            f"the largest output of '{name}' is {amounts.largest:.4g}, {bits:.1f} bits below the limit of {dtype}",
            Place("forward", module=name),
            {"largest": amounts.largest, "limit": limit, "head room in bits": bits, "modules": len(tight)},
            f"Compute '{name}' in float32 or bfloat16, or take a mode of a larger range than {dtype}",
        )
        what = f"outputs come close to the limit of {dtype}{others}"
        yield Finding("headroom", what, (cause,), seen.step, subject.world.rank)

    def _depth(self, subject: Subject, seen: Seen) -> Iterator[Finding]:
        for stack, module in subject.model.named_modules():
            if isinstance(module, nn.ModuleList | nn.Sequential) and stack not in self._told:
                layers = layer_sizes(stack, module, seen.gradients)
                if len(layers) >= FEWEST_LAYERS and abs(math.log2(layers[0][1] / layers[-1][1])) > MOST_CHANGE:
                    self._told.add(stack)
                    yield _over_depth(subject, seen, stack or type(subject.model).__name__, layers)

    def _accumulation(self, subject: Subject, record: StepRecord) -> Iterator[Finding]:
        steps = len(record.passes)
        if steps < MANY_MICRO_STEPS or "accumulation" in self._told:
            return
        dtypes = {name: p.grad.dtype for name, p in subject.model.named_parameters() if p.grad is not None}
        name = next((name for name, dtype in dtypes.items() if dtype in SIGNIFICAND), "")
        if not name:
            return
        self._told.add("accumulation")
        dtype, bits = _short(dtypes[name]), SIGNIFICAND[dtypes[name]]
        left = max(bits - math.log2(steps), 0)
        cause = Cause(
            "precision",
            f"'{name}' and others add {steps} micro-batches in {dtype}, of {bits} bits: the last ones keep {left:.0f} "
            f"bits, and values below 2^-{bits} of the sum are lost",
            Place("backward", parameter=name),
            {"micro-batches": steps, "bits": bits, "bits left": left},
            "Accumulate gradients in float32: float32 weights under autocast, or float32 masters",
        )
        what = f"gradients are accumulated over {steps} micro-batches in {dtype}"
        yield Finding("accumulation_in_16_bit", what, (cause,), record.step, subject.world.rank)


def layer_sizes(stack: str, module: nn.Module, gradients: Mapping[str, Gradient]) -> list[tuple[str, float]]:
    """Return the largest gradient of each layer of a stack, in its order; empty unless all are alike and have one."""
    children = [(name, child) for name, child in module.named_children() if any(True for _ in child.parameters())]
    prefixes = [f"{stack}.{name}" if stack else name for name, _ in children]
    sizes = dict.fromkeys(prefixes, 0.0)
    for name, grad in gradients.items():
        layer = next((prefix for prefix in prefixes if name.startswith(f"{prefix}.")), None)
        if layer is not None and grad is not None:
            sizes[layer] = max(sizes[layer], grad.largest)
    whole = len({type(child) for _, child in children}) == 1 and all(0 < size < math.inf for size in sizes.values())
    return [*sizes.items()] if whole else []


def _over_depth(subject: Subject, seen: Seen, stack: str, layers: list[tuple[str, float]]) -> Finding:
    """Gradients flow from the last layer to the first: name the layer through which they change most."""
    (first, at_first), (last, at_last) = layers[0], layers[-1]
    steps = [(math.log2(lower / upper), name) for (_, lower), (name, upper) in pairwise(layers)]
    vanish = at_first < at_last
    step, begins = (min if vanish else max)(steps)
    cause = Cause(
        "model",
        f"from '{last}' to '{first}' the largest gradient goes from {at_last:.3g} to {at_first:.3g}; it changes most "
        f"through '{begins}'",
        Place("backward", module=begins),
        {"first layer": at_first, "last layer": at_last, "bits through this layer": step},
        f"Look at the initial weights, the residual path and the norm of '{begins}'",
    )
    what = f"the gradients {'vanish' if vanish else 'explode'} over the {len(layers)} layers of '{stack}'"
    return Finding("gradients_over_depth", what, (cause,), seen.step, subject.world.rank)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
