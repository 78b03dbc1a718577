"""Says in words why an operation makes numbers that are not finite, and what to do about it."""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from rawloop.origin.backward import CHANGED, SUM
from rawloop.origin.spots import Call, Origin
from rawloop.origin.tensors import base_of, dtype_name, first_wrong, floats_in, largest, limit, trouble
from rawloop.origin.twin import run_again, wider

Blamed = Literal["data", "code", "precision", "optimizer"]
Verdict = tuple[Blamed, str, str]  # whose fault it is, why, what to do

ABSURD = 1e3  # weights of trained models are smaller
DIVISIONS = ("div", "rdiv", "true_divide", "divide", "reciprocal")
ENTROPIES = ("cross_entropy", "nll_loss")
PICKS = (*ENTROPIES, "gather", "take_along_dim", "kl_div", "getitem")

# Why an operation is not finite in forward, and what to do.
RULES = {
    name: rule
    for names, rule in {
        ("log", "log2", "log10"): (
            "{base} of {value:.4g}",
            "Clamp the argument from below, as by 1e-6, or compute log-probabilities by log_softmax or logsigmoid",
        ),
        ("sqrt", "rsqrt", "pow", "acos", "asin", "atanh", "log1p", "acosh", "logit"): (
            "{base} of {value:.4g}",
            "Clamp its argument to the range where it is finite",
        ),
        ("exp", "exp2", "expm1", "sinh", "cosh"): (
            "{base} of {value:.4g}, which is too large for {dtype}",
            "Subtract the maximum first (logsumexp, softmax), or clamp the argument",
        ),
        ENTROPIES: (
            "{base} of a target whose logit is masked, or that overflows",
            "Do not mask classes that are targets",
        ),
    }.items()
    for name in names
}
# What to do if the gradient is not finite.
EPS = "Add a small number before it, as sqrt(x + 1e-8)"
BACKWARD = {
    "sqrt": f"The derivative of a square root at 0 is infinite. {EPS}",
    "pow": "The derivative of a power below 1 at 0 is infinite. Clamp its argument from below",
    **dict.fromkeys(("linalg_vector_norm", "norm"), f"The derivative of a norm at 0 is not defined. {EPS}"),
    "div": "Clamp the divisor from below before dividing",
    "log": "Clamp its argument from below before it: a torch.where after it does not stop the gradient",
    **dict.fromkeys(("acos", "asin"), "Clamp its argument to less than 1 in magnitude"),
    "std": "The derivative of a standard deviation of equal numbers is infinite. Add a small number to the variance",
}


@dataclass
class Reason:
    """Why an operation makes numbers that are not finite, and what to do.

    Args:
        blamed: `code` is the model or the loss, `optimizer` what changes gradients between backward and the update.
        index: of the first number in a tensor of this `shape` that is not finite; empty if unknown.
        parameter: the name of a weight whose magnitude is absurd.
    """

    blamed: Blamed
    what: str
    advice: str = ""
    evidence: dict[str, float | int | str] = field(default_factory=dict)
    index: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()
    parameter: str = ""

    def locate(self, wrong: Tensor) -> None:
        """Take the first number of a tensor that is not finite, and how many are not."""
        self.index, self.shape = first_wrong(wrong), tuple(wrong.shape)
        self.evidence["not finite"] = f"{int((~wrong.isfinite()).sum()):,} of {wrong.numel():,}"

    def decide(self, verdict: Verdict) -> None:
        """Take whose fault it is, why, and what to do."""
        self.blamed, self.what, self.advice = verdict


def reason(origin: Origin) -> Reason:
    """Return why an origin is one, from its captured operation if there is one."""
    call = origin.call
    if origin.given or call is None:
        return Reason(*_unseen(origin), _magnitude(origin.gradient, origin.dtype))
    found = _forward(origin, call) if origin.phase == "forward" else _backward(origin, call)
    if origin.later:
        found.what += f"; a division by the infinity gives 0, which {origin.later} cannot take"
    return found


def _unseen(origin: Origin) -> Verdict:
    """Return what is known without the operation."""
    kind, name = _kind(origin.kind), origin.operation or "an operation that torch does not show"
    if origin.given:
        return "data", f"{origin.given} contains {kind}", "Drop or repair this sample"
    if name == CHANGED:
        of = f" of '{origin.parameter}'" if origin.parameter else ""
        what = f"backward computes a finite gradient{of}, and {origin.hook or 'a hook'} makes {kind} of it"
        return "optimizer", what, "Guard the hook's divisions: a norm that it divides by may be zero"
    if name == SUM:
        whose = f"'{origin.parameter}'" if origin.parameter else "a tensor that is used more than once"
        what = f"the parts of the gradient of {whose} are finite, and their sum is not"
        blamed: Blamed = "precision" if origin.dtype.itemsize < 4 else "code"
        return blamed, what, "Lower the loss scale, or compute this part in float32"
    if origin.phase == "forward":
        return "code", f"{name} makes {kind} from finite inputs", f"Look at the kernel of {name}"
    what = f"the backward pass of {name} makes {kind} from finite gradients"
    return "code", what, f"Look at the divisions and roots in the backward method of {name}"


def _forward(origin: Origin, call: Call) -> Reason:
    name, base = origin.operation, base_of(origin.operation)
    found = Reason("code", f"{name} makes {_kind(origin.kind)} from finite inputs")
    found.advice = "Keep its inputs in the range where its result is finite"
    found.evidence = _magnitude(largest(floats_in((call.args, call.kwargs))), origin.dtype)
    wrong = next((out for out in call.outputs if trouble(out)), None)
    if wrong is not None:
        found.locate(wrong)
    if origin.blocked:
        found.decide(_of_mask(origin, base))
        return found
    twin, _ = run_again(call, wider(origin.dtype)) or ([], [])
    size = largest(twin) if twin and not any(map(trouble, twin)) else None
    if size is not None:
        found.evidence[f"in {dtype_name(wider(origin.dtype))}"] = size
    if size is not None and origin.dtype.itemsize < 4:
        found.decide(_too_narrow(name, size, origin.dtype, "Take bf16, or scale the input of this operation down"))
    elif (known := _explained(base, call, found.index, wrong)) is not None:
        found.decide(known)
        return found
    _add_weights(found, call)
    return found


def _too_narrow(name: str, size: float, dtype: torch.dtype, advice: str) -> Verdict:
    return (
        "precision",
        f"{name} gives {size:.4g} in float32, and {dtype_name(dtype)} ends at {limit(dtype):.6g}",
        advice,
    )


def _of_mask(origin: Origin, base: str) -> Verdict:
    name = origin.operation
    if base in PICKS:
        what = f"{name} scores a target whose class a mask blocks"
        return "data", what, "Do not mask classes that are targets, or ignore these targets"
    if origin.kind == "inf":
        return "code", f"infinities of a mask reach the loss through {name}", "Mask the result as well"
    what = f"a mask blocks every position of a row, and {name} makes NaN from it"
    return "data", what, "Give every row at least one position that is not masked, or drop the sample"


def _add_weights(found: Reason, call: Call) -> None:
    """Name a weight among the arguments whose magnitude is absurd."""
    tensors = list(floats_in((call.args, call.kwargs)))
    sizes = {name: largest([tensors[n]]) for n, name in call.weights.items()}
    heavy = max(sizes, key=lambda name: sizes[name], default="")
    if heavy and sizes[heavy] >= ABSURD:
        found.parameter = heavy
        found.what += f"; the weight '{heavy}' has values up to {sizes[heavy]:.4g}"
        found.advice = "Such weights come from a learning rate that is too high, or from a damaged file"


def _explained(base: str, call: Call, index: tuple[int, ...], wrong: Tensor | None) -> Verdict | None:
    """Return whose fault a result is, why it is not finite, and what to do; None if no rule is known."""
    if base in DIVISIONS:
        return _division(base, call, index, wrong)
    if base in ("mean", "nanmean", "std", "var") and (few := _too_few(base, call)):
        return "data", f"{base} of {few}", "Skip the term if nothing is left to average"
    if base in ENTROPIES and _all_ignored(call):
        what = f"{base} has no target: each one is ignored"
        return "data", what, "Divide a sum by max(1, targets), or drop such batches"
    if base not in RULES:
        return None
    what, advice = RULES[base]
    value, dtype = _value(call, 0, index, wrong), dtype_name(wrong.dtype) if wrong is not None else "it"
    return "code", what.format(base=base, value=value, dtype=dtype), advice


def _division(base: str, call: Call, index: tuple[int, ...], wrong: Tensor | None) -> Verdict:
    swapped = base in ("rdiv", "reciprocal")
    above, below = (_value(call, one, index, wrong) for one in ((1, 0) if swapped else (0, 1)))
    if below == 0 and above == 0 and wrong is not None and wrong.numel() == 1:
        advice = "Divide by max(1, count), or drop batches without targets"
        return "data", "0 is divided by 0: nothing was counted, as when every target is masked", advice
    return "code", f"{above:.4g} is divided by {below:.4g}", "Add a small number to the divisor, or clamp it from below"


def _value(call: Call, position: int, index: tuple[int, ...], wrong: Tensor | None) -> float:
    """Return the number of an argument that belongs to an index of the result; NaN if there is none."""
    given = call.args[position] if position < len(call.args) else 1 if position == 1 else None  # 1: of reciprocal
    if isinstance(given, int | float):
        return float(given)
    if not isinstance(given, Tensor) or wrong is None or given.dim() > wrong.dim():
        return math.nan
    sizes = zip(reversed(given.shape), reversed(wrong.shape), strict=False)
    fits = all(one in (1, other) for one, other in sizes)
    return float(given.detach().expand(wrong.shape)[index]) if fits else math.nan


def _too_few(base: str, call: Call) -> str:
    given = call.args[0] if call.args else None
    if not isinstance(given, Tensor) or given.numel() == 0:
        return "no number" if isinstance(given, Tensor) else ""
    return "a single number" if base in ("std", "var") and not trouble(given) else ""


def _all_ignored(call: Call) -> bool:
    targets = call.args[1] if len(call.args) > 1 else call.kwargs.get("target")
    if not isinstance(targets, Tensor) or targets.is_floating_point():
        return False
    ignored = call.kwargs.get("ignore_index", call.args[4] if len(call.args) > 4 else -100)
    return bool((targets == ignored).all())


def _backward(origin: Origin, call: Call) -> Reason:
    found = Reason(*_unseen(origin), _magnitude(origin.gradient, origin.dtype))
    _, gradients = (call.gradients and run_again(call)) or ([], [])
    pairs = zip(floats_in((call.args, call.kwargs)), gradients, strict=False)
    wrong = next(((given, one) for given, one in pairs if one is not None and trouble(one)), None)
    if wrong is None or origin.operation in (SUM, CHANGED):
        return found
    given, gradient = wrong
    value = float(given.detach()[first_wrong(gradient)])
    found.evidence["input"] = value
    found.locate(gradient)
    name, dtype = f"the backward pass of {origin.operation}", dtype_name(origin.dtype)
    _, twin = run_again(call, wider(origin.dtype)) or ([], [])
    wide = [one for one in twin if one is not None]
    if wide and not any(map(trouble, wide)) and origin.dtype.itemsize < 4:
        size = found.evidence["in float32"] = largest(wide)
        found.decide(_too_narrow(name, size, origin.dtype, "Lower the loss scale, or take bf16"))
        return found
    found.what = f"{name} at {value:.4g} makes {_kind(origin.kind)} from finite gradients"
    found.advice = BACKWARD.get(base_of(origin.operation), "Keep its argument away from this value")
    if abs(value) > 1 and any(map(trouble, call.outputs)):
        found.what = f"{origin.operation} of {value:.4g} is too large for {dtype}, and {found.what}"
        found.advice = "Scale its input down before, or compute this part in a wider dtype"
    return found


def _magnitude(size: float, dtype: torch.dtype) -> dict[str, float | int | str]:
    """Return the largest magnitude if it is known, the dtype, its limit, and the head room in bits."""
    found: dict[str, float | int | str] = {} if math.isnan(size) else {"largest before": size}
    found |= {"dtype": dtype_name(dtype), "limit": limit(dtype)}
    if size > 0 and math.isfinite(size):
        found["head room in bits"] = round(math.log2(limit(dtype)) - math.log2(size), 2)
    return found


def _kind(kind: str) -> str:
    return "NaN" if kind == "nan" else "infinity"
