"""Activations and gradients against their dtype: head room, flushed shares, the norm over depth, accumulation."""

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from statistics import median

import torch
from torch import nn

from rawloop.watch.findings import Cause, Finding, Place
from rawloop.watch.look import Look, Seen
from rawloop.watch.measure import LARGEST, GradientAmounts
from rawloop.watch.subject import Detector, StepRecord, Subject

LEAST_HEADROOM = 3.0  # bits between a module's outputs and the largest number of their dtype
MOST_LOST = 0.05  # share of a module's gradients that are flushed to zero
ROOM = 4  # bits by which a scale must be able to grow before it is called too low
FEWEST_LAYERS = 4  # of a stack that is judged over depth
MOST_CHANGE = 10.0  # of the gradient's norm from one end of a stack to the other, in bits
MANY_MICRO_STEPS = 32
SIGNIFICAND = {torch.bfloat16: 8, torch.float16: 11}  # bits, with the leading one


class Gradients(Detector):
    """Looks at the magnitudes of outputs and gradients, module by module."""

    def __init__(self, look: Look | None = None) -> None:
        self.look = look or Look()
        self._told: set[str] = set()

    def batch(self, subject: Subject, record: StepRecord) -> Iterable[Finding]:
        """Begin the look."""
        self.look.begin(subject, record)
        return ()

    def gradients(self, subject: Subject, record: StepRecord) -> Iterable[Finding]:
        """Measure, and judge what the accumulation of this window has lost."""
        self.look.gradients(subject, record)
        return self._accumulation(subject, record)

    def end(self, subject: Subject, record: StepRecord) -> Iterable[Finding]:
        """Judge what the look has seen."""
        seen = self.look.seen(record)
        if seen is not None and not seen.calls and "calls" not in self._told:
            self._told.add("calls")
            yield _without_modules(subject, seen)
        if seen is not None:
            yield from self._headroom(subject, seen)
            yield from self._flushed(subject, seen)
            yield from self._depth(subject, seen)

    def finish(self, subject: Subject) -> Iterable[Finding]:
        """Take the hooks off."""
        self.look.stop()
        return ()

    def _headroom(self, subject: Subject, seen: Seen) -> Iterator[Finding]:
        outputs = [(name, a) for (kind, name), a in seen.amounts.items() if kind == "forward" and a.finite]
        outputs = [(name, a) for name, a in outputs if a.headroom < LEAST_HEADROOM and name not in self._told]
        tight = sorted((round(a.headroom, 1), seen.calls[name].order, name, a) for name, a in outputs)
        if not tight:
            return
        self._told |= {name for name, _ in outputs}
        bits, _, name, amounts = tight[0]
        limit, dtype = torch.finfo(amounts.dtype).max, _short(amounts.dtype)
        others = f", and {len(tight) - 1} more modules" if len(tight) > 1 else ""
        cause = Cause(
            "precision",
            f"the largest output of '{name}' is {amounts.largest:.4g}, {bits:.1f} bits below the limit of {dtype}",
            Place("forward", module=name),
            {"largest": amounts.largest, "limit": limit, "head room in bits": bits, "modules": len(tight)},
            f"Compute '{name}' in float32 or bfloat16, or take a mode of a larger range than {dtype}",
        )
        yield Finding(
            "headroom", f"outputs come close to the limit of {dtype}{others}", (cause,), seen.step, subject.world.rank
        )

    def _flushed(self, subject: Subject, seen: Seen) -> Iterator[Finding]:
        if not seen.fp16:
            return
        pairs = [(name, grad) for name, grad in seen.gradients.items() if grad is not None and grad.rows]
        worst = sorted(((g.lost, name) for name, g in pairs if g.lost > MOST_LOST and seen.in_fp16(name)), reverse=True)
        top = max((grad.exponents.top for _, grad in pairs if grad.exponents.top is not None), default=0) + seen.bits
        worst = [item for item in worst if item[1] not in self._told]
        if not worst or top > LARGEST - ROOM:  # a much larger scale would overflow elsewhere
            return
        self._told |= {name for _, name in worst}
        lost, name = worst[0]
        module, saving = name.rpartition(".")[0], 2.0 ** (LARGEST - 2 - top + seen.bits)
        grad = seen.gradients[name]
        assert grad is not None
        cause = Cause(
            "precision",
            f"FP16 rounds {lost:.1%} of the gradient of '{name}' to zero under a loss scale of {seen.loss_scale:g}",
            Place("backward", module=module, parameter=name),
            {
                "lost": lost,
                "subnormal": grad.exponents.shifted(seen.bits).subnormal(1.0),
                "loss scale": seen.loss_scale,
                "parameters": len(worst),
            },
            f"Start the loss scale at {saving:g}, which brings the largest gradient to 2^{LARGEST - 2}",
        )
        yield Finding(
            "gradients_flushed",
            f"gradients of {len(worst)} parameters are largely flushed to zero",
            (cause,),
            seen.step,
            subject.world.rank,
        )

    def _depth(self, subject: Subject, seen: Seen) -> Iterator[Finding]:
        for stack, module in subject.model.named_modules():
            if not isinstance(module, nn.ModuleList | nn.Sequential) or stack in self._told:
                continue
            norms = layer_norms(stack, module, seen.gradients)
            if len(norms) < FEWEST_LAYERS:
                continue
            bits = [math.log2(norm) for norm in norms.values()]
            change = bits[0] - bits[-1]
            if abs(change) <= MOST_CHANGE:
                continue
            self._told.add(stack)
            yield _depth_finding(subject, seen, stack, norms, change)

    def _accumulation(self, subject: Subject, record: StepRecord) -> Iterator[Finding]:
        steps = len(record.passes)
        if steps < MANY_MICRO_STEPS or "accumulation" in self._told:
            return
        named = ((name, p) for name, p in subject.model.named_parameters() if p.grad is not None)
        name, dtype = next(((n, p.grad.dtype) for n, p in named if p.grad.dtype in SIGNIFICAND), ("", None))  # type: ignore[union-attr]
        if dtype is None:
            return
        self._told.add("accumulation")
        left = SIGNIFICAND[dtype] - math.log2(steps)
        cause = Cause(
            "precision",
            f"'{name}' and others add {steps} micro-batches in {_short(dtype)}, of {SIGNIFICAND[dtype]} bits: the last "
            f"ones keep {max(left, 0):.0f} bits, and values below 2^-{SIGNIFICAND[dtype]} of the sum are lost",
            Place("backward", parameter=name),
            {"micro-batches": steps, "bits": SIGNIFICAND[dtype], "bits left": left},
            "Accumulate gradients in float32: float32 weights under autocast, or float32 masters",
        )
        what = f"gradients are accumulated over {steps} micro-batches in {_short(dtype)}"
        yield Finding("accumulation_in_16_bit", what, (cause,), record.step, subject.world.rank)


def layer_norms(stack: str, module: nn.Module, gradients: Mapping[str, GradientAmounts | None]) -> dict[str, float]:
    """Return the gradient's norm of each layer of a stack, in its order, if all are of one type and have gradients."""
    squares: dict[str, float] = {}
    types = set()
    for name, child in module.named_children():
        prefix = f"{stack}.{name}" if stack else name
        norms = [grad.norm for key, grad in gradients.items() if grad is not None and key.startswith(f"{prefix}.")]
        if any(True for _ in child.parameters()):
            types.add(type(child))
            squares[prefix] = math.hypot(*norms)
    whole = len(types) == 1 and all(0 < norm < math.inf for norm in squares.values())
    return squares if whole else {}


def _without_modules(subject: Subject, seen: Seen) -> Finding:
    cause = Cause(
        "not known",
        "the model is compiled, and hooks on its modules would compile it again; or its forward pass calls no module",
        advice="Watch the model before it is compiled to measure its modules; gradients of parameters are measured",
    )
    what = "no module was seen in the forward pass"
    return Finding("modules_not_seen", what, (cause,), seen.step, subject.world.rank, ordinary=True)


def _depth_finding(subject: Subject, seen: Seen, stack: str, norms: Mapping[str, float], change: float) -> Finding:
    """Gradients flow from the last layer to the first: name the layer through which they change most."""
    layers = list(norms.items())
    vanishes = change < 0
    steps = [(math.log2(lower / upper), name) for (_, lower), (name, upper) in pairwise(layers)]
    step, begins = (min if vanishes else max)(steps)
    what = "vanish" if vanishes else "explode"
    first, last = layers[0], layers[-1]
    usual = median(change for change, _ in steps)
    cause = Cause(
        "model",
        f"from '{last[0]}' to '{first[0]}' the norm of the gradients goes from {last[1]:.3g} to {first[1]:.3g}; it "
        f"changes most through '{begins}'",
        Place("backward", module=begins),
        {
            "norm of first layer": first[1],
            "norm of last layer": last[1],
            "bits through this layer": step,
            "bits per layer": usual,
        },
        f"Look at the initial weights, the residual path and the norm of '{begins}'",
    )
    return Finding(
        f"gradients_{what}",
        f"the gradients {what} over the {len(layers)} layers of '{stack or type(subject.model).__name__}'",
        (cause,),
        seen.step,
        subject.world.rank,
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
