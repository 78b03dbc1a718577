"""Words for trained parts that the loss does not reach: why, and where their graph ends."""

from collections.abc import Sequence

from torch import nn

from rawloop.errors import first_few
from rawloop.watch.findings import Cause, Finding, Place, Whose
from rawloop.watch.look import Seen
from rawloop.watch.measure import Amounts
from rawloop.watch.subject import Subject

SMALL = 0.01  # share of the trained values below which an unused part is only noted


def module_of(parameter: str) -> str:
    """Return the name of the module that holds a parameter."""
    return parameter.rpartition(".")[0]


def unreached(subject: Subject, seen: Seen, names: Sequence[str], kind: str, since: int, looks: int) -> Finding:
    """Return the finding of trained parameters without a gradient (`no_gradient`), or with zeros (`gradient_zero`).

    The modules of all of them were called in the look, or of none; `since` is the step of the first of `looks` looks.
    """
    modules = {module_of(name) for name in names}
    called = [module for module in seen.calls if module in modules]
    sizes = {name: p.numel() for name, p in subject.model.named_parameters() if name in seen.gradients}
    share = sum(sizes.get(name, 0) for name in names) / max(sum(sizes.values()), 1)
    alarm = _is_start(seen, called) or (share >= SMALL and len(called) > 1) or _has_equals(subject, seen, names)
    whose: Whose = "model"
    if seen.calls and not called:
        alarm, module, what = False, module_of(names[0]), f"the modules of {first_few(names)} were not called"
        advice = "This is usual for experts without tokens and for heads that this task does not use; else freeze them"
    elif kind == "no_gradient":
        sure, module, what, advice = _why_absent(seen, called or [module_of(names[-1])])
        alarm = alarm or sure
    else:
        alarm, (whose, module, what, advice) = True, _why_zero(seen, names[0], called or [module_of(names[-1])])
    place = Place("backward", module=module, optimizer=whole_group(subject, names))
    evidence = {"parameters": len(names), "share of the trained values": share, "looks": looks}
    cause = Cause(whose, what, place, evidence, advice)
    such = "no gradient" if kind == "no_gradient" else "a gradient of exactly zero"
    symptom = f"{len(names)} trained parameters have {such}: {first_few(names, most=3)}"
    return Finding(kind, symptom, (cause,), seen.step, subject.world.rank, ordinary=not alarm, since=since)


def _has_equals(subject: Subject, seen: Seen, names: Sequence[str]) -> bool:
    """Whether other modules of the same list or dict, such as the heads of other codebooks, have gradients."""
    for name in names:
        parent, _, own = module_of(name).rpartition(".")
        holder = subject.model.get_submodule(parent)
        if isinstance(holder, nn.ModuleList | nn.ModuleDict):
            others = [f"{parent}.{key}." for key in dict(holder.named_children()) if key != own]
            if any(grad is not None and n.startswith(tuple(others)) for n, grad in seen.gradients.items()):
                return True
    return False


def _why_absent(seen: Seen, called: Sequence[str]) -> tuple[bool, str, str, str]:
    """Return whether a graph is surely cut, the module where, what has happened, and what to do."""
    calls, last = {name: seen.calls[name] for name in called if name in seen.calls}, called[-1]
    if calls and not any(call.with_grad for call in calls.values()):
        advice = "Call it with gradients, or set requires_grad of its parameters to False"
        return True, called[0], f"'{called[0]}' was called under no_grad or inference_mode", advice
    cut = next((name for name in reversed(calls) if calls[name].cut_by), "")
    reader = calls[cut].cut_by if cut else ""
    if not cut and _is_start(seen, called):  # computed from the output, and detached then
        later = list(seen.calls)[list(seen.calls).index(last) :]
        cut, reader = last, next((name for name in later[1:] if seen.calls[name].fed_without_graph), "")
    if reader:
        what = f"the graph is cut between '{cut}' and '{reader}', as by .detach(), .data or no_grad"
        return True, cut, what, "Pass the tensor on as it is, or freeze what comes before"
    what = f"the output of '{last}' is detached, or nothing on the way to the loss uses it"
    return False, last, what, f"Look at what becomes of the output of '{last}', or freeze these parts"


def _is_start(seen: Seen, called: Sequence[str]) -> bool:
    """Whether the first module of the forward pass that has trained parameters is among them."""
    trained = {module_of(name) for name in seen.gradients}
    return next((name for name in seen.calls if name in trained), None) in called


def _why_zero(seen: Seen, first: str, called: Sequence[str]) -> tuple[Whose, str, str, str]:
    """Return whose fault a gradient of zeros is, the module where, what has happened, and what to do."""
    if seen.in_fp16(first) and seen.loss_scale < 2**8:
        what = f"FP16 rounds gradients below 2^-25 to zero, and the loss scale is {seen.loss_scale:g}"
        return "precision", called[-1], what, "Raise the loss scale, or use bfloat16"
    if dead := _dead(seen, called):
        return "model", *dead
    what = f"'{called[-1]}' is connected to the loss, and what comes after it multiplies its output by zero"
    advice = "Look for a gate, mask or weight of zeros, a saturated activation or a dead ReLU behind it"
    return "model", called[-1], what, advice


def _dead(seen: Seen, called: Sequence[str]) -> tuple[str, str, str] | None:
    """Return the module that passes nothing on, why, and what to do; None if the outputs show none.

    It is the first whose output is zero in every value after a module without a gradient. Without one, as an activation
    may be a function, it is the last module without a gradient whose outputs a ReLU turns into zeros.
    """
    made, trained, before = seen.outputs, {module_of(name) for name in seen.gradients}, ""
    negative = [name for name in called if name in made and made[name].highest <= 0 and made[name].lowest < 0]
    advice = "Look at the weight and bias of '{}': a bias or a learning rate that is too large kills its units"
    for name in seen.calls:
        if before in called and name in made and made[name].lowest == made[name].highest == 0:
            why = f": '{before}' gives it {_range(made[before])}" if before in negative else f", after '{before}'"
            return name, f"the output of '{name}' is zero in every value{why}", advice.format(before)
        before = name if name in trained else before
    if not negative:
        return None
    last = negative[-1]
    return last, f"'{last}' gives {_range(made[last])}, of which a ReLU passes nothing on", advice.format(last)


def _range(amounts: Amounts) -> str:
    return f"values from {amounts.lowest:.4g} to {amounts.highest:.4g}"


def whole_group(subject: Subject, names: Sequence[str]) -> str:
    """Return the name of the optimizer's parameter group that has no other parameter; empty if there is none."""
    ids = {id(p) for name, p in subject.named() if name in set(names)}
    for optimizer in subject.optimizers:
        for place, group in enumerate(optimizer.param_groups):
            trained = [p for p in group["params"] if p.requires_grad]
            if trained and all(id(p) in ids for p in trained):
                return f"{type(optimizer).__name__}, parameter group {place}"
    return ""
