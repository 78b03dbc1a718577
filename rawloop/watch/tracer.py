"""The origin tracer: runs a step that is not finite again, and says where, by which sample, and why."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from rawloop.buffers import untouched
from rawloop.origin import Damage, damaged, gradients_of
from rawloop.watch.findings import MOST_CAUSES, Cause, Finding, Place
from rawloop.watch.pass_tracer import PassTracer
from rawloop.watch.subject import StepRecord, Subject

KIND = "not_finite"
LARGEST = "largest gradient"


def trace(subject: Subject, record: StepRecord) -> Iterable[Finding]:
    """Find why the loss or the gradients of a step are not finite, by running its passes again.

    Call it before any weight has changed. The model, its gradients, buffers, modes and hooks and the random streams are
    as before when it returns. Code that runs recorded operations, outside the model's modules, names the user's line in
    `rawloop.origin.current_line` around each of them.
    """
    causes, ordinary = _causes(subject, record)
    forward = record.loss is None and causes[0].place.phase == "forward"
    lost = forward or (record.loss is not None and not math.isfinite(record.loss))
    gradients = "the norm of the gradients is" if LARGEST in causes[0].evidence else "the gradients are"
    what = f"{'the loss is' if lost else gradients} not finite"
    return [Finding(KIND, what, tuple(causes[:MOST_CAUSES]), record.step, subject.world.rank, ordinary)]


def _causes(subject: Subject, record: StepRecord) -> tuple[list[Cause], bool]:
    """Return the causes of a step that is not finite, and whether it is ordinary."""
    damage = damaged(subject.model)
    if damage is not None:
        return [_of_damage(damage, subject)], False
    failures: list[Cause] = []
    for number, one in enumerate(record.passes):
        tracer = PassTracer(subject, record, number, one)
        try:
            causes = tracer.causes()
        except Exception as error:  # a pass runs the user's code; what it raises is told
            failures += tracer.not_again(error)
            continue
        if causes:
            return causes, tracer.ordinary
    return failures or [_elsewhere(subject, record)], False


def _of_damage(damage: Damage, subject: Subject) -> Cause:
    place = Place("update", parameter=damage.name, rank=subject.world.rank)
    evidence = {"not finite": f"{damage.wrong:,} of {damage.total:,}", "first index": str(list(damage.first))}
    advice = "Start from a checkpoint before it; the step that wrote it, or the file it was loaded from, is the cause"
    if damage.kind != "weight":
        return Cause("model", str(damage), place, evidence, advice)
    if not subject.written_outside(subject.model.get_parameter(damage.name)):
        return Cause("optimizer", str(damage), place, evidence, advice)
    what = f"{damage}: code outside the optimizer has written to it since the last update"
    advice = "Look for what writes weights between two updates: copy_, load_state_dict, clamping, averages"
    return Cause("not known", what, place, evidence, advice)


def _elsewhere(subject: Subject, record: StepRecord) -> Cause:
    """Return the cause of a step that is not finite although each of its passes is when it runs again."""
    rank, size = subject.world.rank, subject.world.size
    wrong = [name for name, one in subject.model.named_parameters() if one.grad is not None and not _finite(one.grad)]
    evidence: dict[str, float | int | str] = {"passes": len(record.passes), "gradients not finite": len(wrong)}
    place = Place(parameter=wrong[0] if wrong else "", rank=rank)
    sums = _sums(subject, record)
    total = next(((name, one) for name, one in sums.items() if not _finite(one.total)), None)
    if total is not None:
        name, one = total
        what = f"each pass is finite, and the sum of the gradients of '{name}' over {len(record.passes)} passes is not"
        evidence |= {"largest of one pass": one.largest, "dtype": str(one.total.dtype).removeprefix("torch.")}
        advice = "Lower the loss scale, divide the loss by the number of passes, or accumulate in float32"
        return Cause("precision", what, Place("backward", parameter=name, rank=rank), evidence, advice)
    if not wrong and record.loss is not None and math.isfinite(record.loss) and (large := _largest(subject, sums)):
        name, size_of = large
        what = (
            f"all gradients are finite, and their norm is not: squares of numbers like {size_of:.3g} overflow float32"
        )
        advice = "Look at what makes the gradient so large; `clip_grad_norm_` would multiply all gradients by zero"
        evidence[LARGEST] = size_of
        return Cause("loss", what, Place("backward", parameter=name, rank=rank), evidence, advice)
    if not record.passes:
        why = f" ({record.why_no_passes})" if record.why_no_passes else ""
        what = f"the step has no pass that can run again{why}; the weights are finite"
        return Cause("not known", what, place, evidence, "Look at the inputs and the loss of this step")
    if size > 1 and wrong and (record.loss is None or math.isfinite(record.loss)):
        what = f"the passes of rank {rank} are finite: the numbers come from another rank, or from the all-reduce"
        return Cause("distributed", what, place, evidence, "Read the finding of the other ranks at this step")
    if wrong and record.loss is not None and math.isfinite(record.loss):
        return _changed(subject, sums.get(wrong[0]), place, evidence)
    what = "each pass is finite when it runs again, so the cause is not in its batch, weights or random streams"
    advice = "Zero the gradients after each step; if they were, look for kernels that are not deterministic"
    return Cause("not known", what, place, evidence, f"{advice}, or hardware")


def _largest(subject: Subject, sums: dict[str, "_Sum"]) -> tuple[str, float] | None:
    """Return the parameter of the largest gradient, also of one before clipping, if its square overflows float32."""
    grads = [(w.grad, name) for name, w in subject.model.named_parameters() if w.grad is not None]
    grads += [(one.total, name) for name, one in sums.items()]
    size, name = max(((float(grad.abs().amax()), name) for grad, name in grads), default=(0.0, ""))
    return (name, size) if size > 1e15 else None


def _changed(subject: Subject, again: "_Sum | None", place: Place, evidence: dict[str, float | int | str]) -> Cause:
    """Return the cause of a gradient that is not finite although backward computes a finite one."""
    weight = subject.model.get_parameter(place.parameter)
    hooked = bool(getattr(weight, "_post_accumulate_grad_hooks", None))
    zero = again is not None and again.largest == 0
    if again is not None:
        evidence = evidence | {"largest when it runs again": again.largest}
    what = f"backward computes a finite gradient of '{place.parameter}' when it runs again: it was changed afterwards"
    what += ", by a hook that runs after accumulation" if hooked else ""
    what += ", and it is zero before, as in a division by its norm" if zero else ""
    advice = "Look at what writes to .grad between backward and the update: hooks, divisions by a norm, clipping"
    if not (hooked or zero):
        advice += "; and whether the gradients of the step before were zeroed"
    return Cause("optimizer" if hooked or zero else "not known", what, place, evidence, advice)


class _Sum(NamedTuple):
    """The sum of a weight's gradients over the passes, and the largest magnitude of one pass."""

    total: Tensor
    largest: float


def _sums(subject: Subject, record: StepRecord) -> dict[str, _Sum]:
    """Run the passes again, and return the sums of the gradients by the weights' names."""
    names = {id(weight): name for name, weight in subject.model.named_parameters()}
    sums: dict[str, _Sum] = {}
    for number, one in enumerate(record.passes):
        with untouched(subject.model, weights=True), torch.enable_grad():
            root = PassTracer(subject, record, number, one).run()
            found = gradients_of(root, subject.model)
        for leaf, gradient in found:
            if gradient is not None and (name := names.get(id(leaf))) is not None:
                known = sums.get(name, _Sum(torch.zeros_like(gradient), 0.0))
                largest = max(known.largest, float(gradient.detach().abs().amax()))
                sums[name] = _Sum(known.total + gradient, largest)
    return {name: sums[name] for name in names.values() if name in sums}


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())
