"""Options that cannot act in their dtype, and optimizer state that is in 16 bits, was cast, or counts wrongly."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD

from rawloop.errors import first_few
from rawloop.watch.findings import Cause, Finding, Place
from rawloop.watch.held import (
    HALF,
    Evidence,
    Held,
    by_label,
    held_by_optimizers,
    module_of,
    norms,
    number,
    read,
)
from rawloop.watch.sample import spread
from rawloop.watch.subject import Detector, StepRecord, Subject

DECAY = 0.01  # lr * weight_decay: the weights halve in 69 updates; usual are 1e-8 to 1e-4
CAST = 0.99  # share of float32 moments that 16 bits hold exactly; of real ones 1 in 65536 (bfloat16)
ENOUGH = 64  # moments that are not zero, to tell
COUNTED = 4  # updates, to tell that a counter stands still
EMPTY = 0.5  # share of the tensors with a gradient whose loaded moments are zero; unused parts have these too


class OptimizerSettings(Detector):
    """Looks at betas, eps and weight decay, before step 0, and at eps again when the state's dtype is known.

    Kinds: `betas_out_of_range`, `betas_swapped`, `eps_rounds_to_zero`, `weight_decay_outweighs`.
    """

    def __init__(self) -> None:
        self._unknown: set[str] = set()  # groups whose state's dtype is not known yet

    def start(self, subject: Subject) -> Iterator[Finding]:
        """Look at every group."""
        for label, held in by_label(held_by_optimizers(subject)).items():
            for whose, kind, what, evidence, advice in [*wrong_betas(held[0].group), *wrong_decay(held[0])]:
                cause = Cause(whose, what, Place(phase="update", optimizer=label), evidence, advice)
                yield Finding(kind, f"{what} ({label})", (cause,), 0, subject.world.rank)
            if any(state_dtype(one) is None for one in held):
                self._unknown.add(label)
            yield from wrong_eps(subject, label, held, 0)

    def end(self, subject: Subject, record: StepRecord) -> Iterator[Finding]:
        """Look at eps of optimizers that have made their first state."""
        if record.applied and self._unknown:
            for label, held in by_label(held_by_optimizers(subject)).items():
                if label in self._unknown:
                    yield from wrong_eps(subject, label, held, record.step)
            self._unknown.clear()


def state_dtype(held: Held) -> torch.dtype | None:
    """Return the dtype of the moments: of those that exist, or of those that torch's optimizers make."""
    found = [tensor.dtype for tensor in moments(held).values()]
    if found:
        return found[0]
    return held.parameter.dtype if type(held.optimizer).__module__.startswith("torch.optim") else None


def moments(held: Held) -> dict[str, Tensor]:
    """Return the floats in the state that have the parameter's shape."""
    shape = held.parameter.shape
    state = {k: v for k, v in held.state.items() if isinstance(v, Tensor) and v.shape == shape and k != "step"}
    return {name: value for name, value in state.items() if value.is_floating_point()}


def wrong_betas(group: dict[str, Any]) -> Iterator[tuple[Any, str, str, Evidence, str]]:
    """Yield what is wrong with a group's betas."""
    betas = [number(beta) for beta in group.get("betas") or ()]
    shown: Evidence = {"betas": str(tuple(betas))}
    if any(not 0 <= beta < 1 for beta in betas):
        what = "a beta outside [0, 1) makes a moment grow without limit, or keeps it at zero"
        yield "optimizer", "betas_out_of_range", what, shown, "Usual are (0.9, 0.999)"
    elif len(betas) == 2 and "eps" in group and betas[0] > betas[1]:
        what = "beta1 is larger than beta2: updates are divided by gradients younger than those that they sum"
        yield "optimizer", "betas_swapped", what, shown, "Usual are (0.9, 0.999); were they swapped?"


def wrong_decay(held: Held) -> Iterator[tuple[Any, str, str, Evidence, str]]:
    """Yield a weight decay that shrinks the weights in a few updates. Adam's, which is normalised, does not."""
    group = held.group
    name = type(held.optimizer).__name__
    decoupled = group.get("decoupled_weight_decay", name == "AdamW") or isinstance(held.optimizer, SGD)
    lr = max(number(group.get("lr", 0.0)), number(group.get("initial_lr", 0.0)))
    product = lr * number(group.get("weight_decay") or 0.0)
    if decoupled and product >= DECAY:
        what = "weight decay shrinks the weights faster than gradients can move them"
        evidence: Evidence = {"lr": lr, "weight_decay": number(group["weight_decay"]), "shrinks per update": product}
        yield "optimizer", "weight_decay_outweighs", what, evidence, "Lower weight_decay; usual are 0.01 to 0.1"


def wrong_eps(subject: Subject, label: str, held: list[Held], step: int) -> Iterator[Finding]:
    """Yield a finding for an eps that is zero in the dtype in which it is added."""
    eps = held[0].group.get("eps")
    if not isinstance(eps, float | int) or "betas" not in held[0].group:
        return
    for one in held:
        dtype = state_dtype(one)
        if dtype is not None and torch.tensor(float(eps)).to(dtype) == 0:
            smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
            kind = str(dtype).removeprefix("torch.")
            what = f"eps rounds to zero in {kind}, so a second moment of zero gives an update that is not finite"
            evidence: Evidence = {"eps": float(eps), "dtype": kind, "smallest number of it": smallest}
            place = Place(phase="update", module=module_of(one.name), parameter=one.name, optimizer=label)
            advice = "Let the optimizer hold float32 weights (autocast, or masters)" if eps else "Set eps to 1e-8"
            cause = Cause("precision" if eps else "optimizer", what, place, evidence, advice)
            yield Finding("eps_rounds_to_zero", f"eps cannot act ({label})", (cause,), step, subject.world.rank)
            return


class OptimizerState(Detector):
    """Looks at the dtype and the counters of the state: of a loaded one before step 0, and on probing steps.

    Kinds: `optimizer_state_16bit` (ordinary if bfloat16 weights have it), `optimizer_state_cast`,
    `optimizer_state_empty`, `optimizer_step_counter`.
    """

    def __init__(self) -> None:
        self._updates = 0
        self._first: float | None = None  # the largest counter before step 0
        self._empty: set[str] = set()  # names whose loaded moments are zero
        self._asked = False

    def start(self, subject: Subject) -> Iterator[Finding]:
        """Look at a state that was loaded."""
        held = [one for one in held_by_optimizers(subject) if moments(one)]
        yield from half_state(subject, held, 0)
        yield from once_cast(subject, held)
        counters, sizes = counted(held), largest_moments(held)
        self._first = max(counters.values(), default=None)
        wrong = [one for one in held if counters.get(one.name, 1.0) < 1 and 0 < sizes[one.name] < math.inf]
        if wrong:
            evidence: Evidence = {"counter": counters[wrong[0].name], "largest moment": sizes[wrong[0].name]}
            evidence |= {"parameters": len(wrong), "largest counter": max(counters.values())}
            what = (
                "the moments are those of a trained state, and the step counter begins anew: Adam divides them by 1-b^t"
            )
            yield told(subject, "optimizer_step_counter", wrong, 0, what, evidence, "Load the counter with the moments")
        self._empty = {one.name for one in held if counters.get(one.name, 0.0) >= 2 and sizes[one.name] == 0}

    def gradients(self, subject: Subject, record: StepRecord) -> Iterator[Finding]:
        """Look once whether parameters whose loaded moments are zero have gradients."""
        if self._asked or not self._empty:
            return
        held = [one for one in held_by_optimizers(subject) if one.gradient is not None and moments(one)]
        sizes = read(norms([one.gradient for one in held if one.gradient is not None], math.inf))
        live = [one for one, size in zip(held, sizes, strict=True) if size > 0]
        self._asked = bool(live)
        empty = [one for one in live if one.name in self._empty]
        if len(empty) > EMPTY * len(live):
            evidence: Evidence = {"parameters": len(empty), "with gradient": len(live)}
            what = "the loaded state counts updates, and its moments are all zero though there are gradients"
            advice = "Load the state of the checkpoint again: a cast, an offload or a failed load has lost it"
            yield told(subject, "optimizer_state_empty", empty, record.step, what, evidence, advice)

    def end(self, subject: Subject, record: StepRecord) -> Iterator[Finding]:
        """Look at the state after an update."""
        self._updates += bool(record.applied)
        if not (record.probing and record.applied):
            return
        held = [one for one in held_by_optimizers(subject) if moments(one)]
        yield from half_state(subject, held, record.step)
        counters = counted(held)
        done = max(counters.values(), default=0.0) - (self._first or 0.0)
        if counters and self._updates >= COUNTED and done < self._updates / 2:
            evidence: Evidence = {"largest counter": max(counters.values()), "updates seen": self._updates}
            evidence["before the first"] = self._first or 0.0
            what = "the step counter has not followed the updates: the state was cleared, or an old one was loaded"
            advice = "Build the optimizer and load its state once, before the loop"
            yield told(subject, "optimizer_step_counter", held, record.step, what, evidence, advice)


def told(
    subject: Subject, kind: str, held: list[Held], step: int, what: str, evidence: Evidence, advice: str
) -> Finding:
    """Return a finding of the optimizer about some of its parameters."""
    one = held[0]
    place = Place(phase="update", module=module_of(one.name), parameter=one.name, optimizer=one.label)
    cause = Cause("optimizer", what, place, evidence, advice)
    names = first_few(one.name for one in held)
    return Finding(kind, f"the state of {names} is wrong", (cause,), step, subject.world.rank)


def counted(held: list[Held]) -> dict[str, float]:
    """Return the step counters by name."""
    having = [one for one in held if isinstance(one.state.get("step"), Tensor | int | float)]
    values = read([torch.as_tensor(one.state["step"], dtype=torch.float64).reshape(()) for one in having])
    return {one.name: value for one, value in zip(having, values, strict=True)}


def largest_moments(held: list[Held]) -> dict[str, float]:
    """Return the largest magnitude among the moments of each parameter."""
    pairs = [(one.name, moment) for one in held for moment in moments(one).values()]
    found: dict[str, float] = {}
    for (name, _), size in zip(pairs, read(norms([moment for _, moment in pairs], math.inf)), strict=True):
        found[name] = max(size, found.get(name, 0.0))
    return found


def half_state(subject: Subject, held: list[Held], step: int) -> Iterator[Finding]:
    """Yield findings for moments in 16 bits: of weights in more bits, of float16 weights, and of bfloat16 weights."""
    in_half = [(one, {m.dtype for m in moments(one).values()} & {*HALF}) for one in held]
    for label, mine in by_label(one for one, dtypes in in_half if dtypes).items():
        one = mine[0]
        weight, dtype = one.parameter.dtype, next(m.dtype for m in moments(one).values() if m.dtype in HALF)
        cast = weight not in HALF
        kind = "optimizer_state_cast" if cast else "optimizer_state_16bit"
        evidence: Evidence = {"state dtype": str(dtype).removeprefix("torch."), "parameters": len(mine)}
        evidence["weights' dtype"] = str(weight).removeprefix("torch.")
        what = "torch makes the state in the weights' dtype, in which small squares are zero and averages stand still"
        advice = "Let the optimizer hold float32 weights (autocast, or masters)"
        if cast:
            what = "the state has fewer bits than the weights: it was cast when it was loaded, or before they were"
            advice = "Load it after the weights have their dtype: load_state_dict casts the state to theirs"
        place = Place(phase="update", module=module_of(one.name), parameter=one.name, optimizer=label)
        cause = Cause("precision", what, place, evidence, advice)
        ordinary = not cast and dtype is torch.bfloat16
        what = f"the optimizer's state is in {evidence['state dtype']} ({label})"
        yield Finding(kind, what, (cause,), step, subject.world.rank, ordinary=ordinary)


@torch.no_grad()
def once_cast(subject: Subject, held: list[Held]) -> Iterator[Finding]:
    """Yield a finding for loaded float32 moments that have only the digits of 16 bits."""
    pairs = [(one, m) for one in held for name, m in moments(one).items() if m.dtype is torch.float32]
    samples = [spread(moment) for _, moment in pairs]
    dtypes = (torch.bfloat16, torch.float16)  # float16 holds most numbers of bfloat16 too
    counts = read([torch.stack([fits(s, dtype) for dtype in dtypes] + [(s != 0).sum()]) for s in samples])
    for place, dtype in enumerate(dtypes):
        cast = [
            (one, row[place], row[2]) for (one, _), row in zip(pairs, counts, strict=True)
            if row[2] >= ENOUGH and row[place] >= CAST * row[2]
        ]  # fmt: skip
        if cast:
            kind = str(dtype).removeprefix("torch.")
            one = cast[0][0]
            evidence: Evidence = {"moments that fit": cast[0][1], "of": cast[0][2], "tensors": len(cast)}
            place_ = Place(phase="update", module=module_of(one.name), parameter=one.name, optimizer=one.label)
            what = f"the float32 state holds only numbers of {kind}: it was cast to {kind} when it was saved or loaded"
            advice = "Load the state after the weights are float32 (after adopt(), with a PrecisionPolicy)"
            cause = Cause("precision", what, place_, evidence, advice)
            what = f"the loaded state of {len(cast)} tensors was in {kind} before"
            yield Finding("optimizer_state_cast", what, (cause,), 0, subject.world.rank)
            return


def fits(sample: Tensor, dtype: torch.dtype) -> Tensor:
    """Count the numbers that a dtype holds exactly, without zeros."""
    return ((sample.to(dtype).float() == sample) & (sample != 0)).sum()
