"""Options that cannot act in their dtype, and optimizer state that is in 16 bits, was cast, or counts wrongly."""

from collections.abc import Iterator

import torch
from torch import Tensor

from rawloop.watch.findings import Finding, Whose
from rawloop.watch.held import HALF, Evidence, Held, by_label, held_by_optimizers, read, short, told
from rawloop.watch.sample import spread
from rawloop.watch.subject import Detector, StepRecord, Subject

CAST = 0.99  # share of float32 moments that 16 bits hold exactly; of real ones 1 in 65536 (bfloat16)
ENOUGH = 64  # moments that are not zero, to tell
COUNTED = 4  # updates, to tell that a counter stands still


class OptimizerState(Detector):
    """Looks at the options and at the dtype of the state: before step 0, and on probing steps with the step counters.

    Kinds: `betas_wrong`, `eps_rounds_to_zero`, `optimizer_state_16bit` (ordinary if bfloat16 weights have it),
    `optimizer_state_cast`, `optimizer_state_lost`.
    """

    def __init__(self) -> None:
        self._updates = 0
        self._first = 0.0  # the largest counter before step 0

    def start(self, subject: Subject) -> Iterator[Finding]:
        """Look at every group, and at a state that was loaded."""
        held = held_by_optimizers(subject)
        for mine in by_label(held).values():
            yield from wrong_betas(subject, mine[0])
        yield from wrong_eps(subject, held, 0)
        yield from half_state(subject, held, 0)
        yield from once_cast(subject, held)
        self._first = most_counted(held) or 0.0

    def end(self, subject: Subject, record: StepRecord) -> Iterator[Finding]:
        """Look at the state after an update."""
        self._updates += bool(record.applied)
        if not (record.probing and record.applied):
            return
        held = held_by_optimizers(subject)
        yield from wrong_eps(subject, held, record.step)  # the dtype of the first state may not have been known
        yield from half_state(subject, held, record.step)
        most = most_counted(held)
        if most is not None and self._updates >= COUNTED and most - self._first < self._updates / 2:
            evidence: Evidence = {"largest counter": most, "updates seen": self._updates}
            evidence["before the first"] = self._first
            what = "the step counter has not followed the updates: the state was cleared, or an old one was loaded"
            advice = "Build the optimizer and load its state once, before the loop"
            place = next(one.place for one in held if moments(one))
            yield told(subject, record.step, "optimizer_state_lost", "optimizer", what, place, evidence, advice)


def state_dtype(held: Held) -> torch.dtype | None:
    """Return the dtype of the moments: of those that exist, or of those that torch's optimizers make."""
    found = [tensor.dtype for tensor in moments(held)]
    if found:
        return found[0]
    return held.parameter.dtype if type(held.optimizer).__module__.startswith("torch.optim") else None


def moments(held: Held) -> list[Tensor]:
    """Return the floats in the state that have the parameter's shape."""
    state = [value for name, value in held.state.items() if isinstance(value, Tensor) and name != "step"]
    return [value for value in state if value.shape == held.parameter.shape and value.is_floating_point()]


def most_counted(held: list[Held]) -> float | None:
    """Return the largest step counter; None if there are none."""
    counters = [one.state["step"] for one in held if moments(one) and "step" in one.state]
    return max(read([torch.as_tensor(each, dtype=torch.float64).reshape(()) for each in counters]), default=None)


def wrong_betas(subject: Subject, held: Held) -> Iterator[Finding]:
    """Yield a finding for betas that cannot average."""
    betas = [float(beta) for beta in held.group.get("betas") or ()]
    if any(not 0 <= beta < 1 for beta in betas):
        what = "a beta outside [0, 1) makes a moment grow without limit, or keeps it at zero"
    elif len(betas) == 2 and "eps" in held.group and betas[0] > betas[1]:
        what = "beta1 is larger than beta2: updates are divided by gradients younger than those that they sum"
    else:
        return
    advice = "Usual are (0.9, 0.999); were they swapped?"
    yield told(subject, 0, "betas_wrong", "optimizer", what, held.place, {"betas": str((*betas,))}, advice)


def wrong_eps(subject: Subject, held: list[Held], step: int) -> Iterator[Finding]:
    """Yield a finding for each group whose eps is zero in the dtype in which it is added."""
    adams = [one for one in held if "betas" in one.group and isinstance(one.group.get("eps"), float | int)]
    adams = [one for one in adams if not type(one.optimizer).__name__.startswith("Lion")]  # divides by nothing
    for mine in by_label(adams).values():
        eps, dtypes = float(mine[0].group["eps"]), [(one, state_dtype(one)) for one in mine]
        lost = [(one, dtype) for one, dtype in dtypes if dtype is not None and torch.tensor(eps).to(dtype) == 0]
        for one, dtype in lost[:1]:
            what = f"eps rounds to zero in {short(dtype)}: a second moment of zero gives an update that is not finite"
            smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
            evidence: Evidence = {"eps": eps, "dtype": short(dtype), "smallest number of it": smallest}
            advice = "Let the optimizer hold float32 weights (autocast, or masters)" if eps else "Set eps to 1e-8"
            whose: Whose = "precision" if eps else "optimizer"
            yield told(subject, step, "eps_rounds_to_zero", whose, what, one.place, evidence, advice)


def half_state(subject: Subject, held: list[Held], step: int) -> Iterator[Finding]:
    """Yield findings for moments in 16 bits: of weights in more bits, of float16 weights, and of bfloat16 weights."""
    in_half = [(one, moment.dtype) for one in held for moment in moments(one) if moment.dtype in HALF]
    dtypes = {one.name: dtype for one, dtype in reversed(in_half)}
    for mine in by_label(one for one in held if one.name in dtypes).values():
        weight, dtype = mine[0].parameter.dtype, dtypes[mine[0].name]
        evidence: Evidence = {"state dtype": short(dtype), "parameters": len(mine), "weights' dtype": short(weight)}
        kind = "optimizer_state_cast"
        what = f"the optimizer's state is in {short(dtype)}: it was cast when it was loaded, or before the weights were"
        advice = "Load it after the weights have their dtype: load_state_dict casts the state to theirs"
        if weight in HALF:
            kind = "optimizer_state_16bit"
            what = f"the optimizer's state is in {short(dtype)} like the weights: small squares are zero in it, and "
            what += "averages stand still"
            advice = "Let the optimizer hold float32 weights (autocast, or masters)"
        ordinary = weight in HALF and dtype is torch.bfloat16
        yield told(subject, step, kind, "precision", what, mine[0].place, evidence, advice, ordinary=ordinary)


@torch.no_grad()
def once_cast(subject: Subject, held: list[Held]) -> Iterator[Finding]:
    """Yield a finding for loaded float32 moments that have only the digits of 16 bits."""
    pairs = [(one, spread(moment)) for one in held for moment in moments(one) if moment.dtype is torch.float32]
    for dtype in (torch.bfloat16, torch.float16):  # float16 holds most numbers of bfloat16 too
        # numbers that the dtype holds exactly, and all, without zeros
        counts = read([torch.stack([((s.to(dtype) == s) & (s != 0)).sum(), (s != 0).sum()]) for _, s in pairs])
        rows = [(one, fit, of) for (one, _), (fit, of) in zip(pairs, counts, strict=True)]
        cast = [row for row in rows if row[2] >= ENOUGH and row[1] >= CAST * row[2]]
        if cast:
            one, fit, of = cast[0]
            evidence: Evidence = {"moments that fit": fit, "of": of, "tensors": len(cast)}
            what = f"the loaded float32 state was in {short(dtype)} before: it holds only numbers of that"
            advice = "Load the state after the weights are float32 (after adopt(), with a PrecisionPolicy)"
            yield told(subject, 0, "optimizer_state_cast", "precision", what, one.place, evidence, advice)
            return
