"""Says in words why an operation makes numbers that are not finite, and what to do about it."""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from rawloop.origin.backward import CHANGED, SUM
from rawloop.origin.find import Origin
from rawloop.origin.forward import Call
from rawloop.origin.tensors import base_of, dtype_name, first_wrong, floats_in, largest, limit, trouble
from rawloop.origin.twin import run_again, wider

Blamed = Literal["data", "code", "precision", "optimizer"]
KEEP = "Keep its inputs in the range where its result is finite"
ABSURD = 1e3  # weights of trained models are smaller
RANGE = "Take bf16, or scale the input of this operation down"


@dataclass
class Reason:
    """Why an operation makes numbers that are not finite.

    Args:
        blamed: `code` is the model or the loss, `optimizer` what changes gradients between backward and the update.
        what: one sentence.
        advice: what to do.
        evidence: numbers.
        index: of the first number in the operation's output that is not finite; empty if unknown.
        shape: of that output.
        parameter: the name of a weight whose magnitude is absurd.
    """

    blamed: Blamed
    what: str
    advice: str = ""
    evidence: dict[str, float | int | str] = field(default_factory=dict)
    index: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()
    parameter: str = ""


def reason(origin: Origin) -> Reason:
    """Return why an origin is one, from its captured operation if there is one."""
    if origin.given:
        evidence: dict[str, float | int | str] = {"dtype": dtype_name(origin.dtype)}
        return Reason("data", f"{origin.given} contains {_kind(origin.kind)}", "Drop or repair this sample", evidence)
    call = origin.call
    if call is None:
        return _unseen(origin)
    found = _forward(origin, call) if origin.phase == "forward" else _backward(origin, call)
    if origin.later:
        found.what += f"; a division by the infinity gives 0, which {origin.later} cannot take"
    return found


def _unseen(origin: Origin) -> Reason:
    """Return the reason of an origin whose operation is not captured."""
    kind, size = _kind(origin.kind), origin.gradient
    if origin.operation == CHANGED:
        of = f" of '{origin.parameter}'" if origin.parameter else ""
        what = f"backward computes a finite gradient{of}, and {origin.hook or 'a hook'} makes {kind} of it"
        advice = "Guard the hook's divisions: a norm that it divides by may be zero"
        return Reason("optimizer", what, advice, _magnitude(size, origin.dtype))
    if origin.parameter:
        what = f"the parts of the gradient of '{origin.parameter}' are finite, and their sum is not"
        advice = "Lower the loss scale, or keep this weight in float32"
        return Reason(_by_range(origin.dtype), what, advice, _magnitude(size, origin.dtype))
    name = origin.operation or "an operation that torch does not show"
    if origin.operation == SUM:
        what = "gradients of a tensor that is used more than once are finite one by one, and their sum is not"
        return Reason(_by_range(origin.dtype), what, "Lower the loss scale", _magnitude(size, origin.dtype))
    if origin.phase == "backward":
        what = f"the backward pass of {name} makes {kind} from finite gradients"
        advice = f"Look at the divisions and roots in the backward method of {name}"
        return Reason("code", what, advice, _magnitude(size, origin.dtype))
    evidence: dict[str, float | int | str] = {"dtype": dtype_name(origin.dtype)}
    return Reason("code", f"{name} makes {kind} from finite inputs", f"Look at the kernel of {name}", evidence)


def _by_range(dtype: torch.dtype) -> Blamed:
    return "precision" if dtype.itemsize < 4 else "code"


def _forward(origin: Origin, call: Call) -> Reason:
    evidence = _magnitude(largest(floats_in((call.args, call.kwargs))), origin.dtype)
    found = Reason("code", f"{origin.operation} makes {_kind(origin.kind)} from finite inputs", KEEP, evidence)
    wrong = next((out for out in call.outputs if trouble(out)), None)
    if wrong is not None:
        found.index, found.shape = first_wrong(wrong), tuple(wrong.shape)
        evidence["not finite"] = f"{int((~wrong.isfinite()).sum()):,} of {wrong.numel():,}"
    base = base_of(origin.operation)
    if origin.blocked:
        found.blamed, found.what, found.advice = _of_mask(origin, base)
        return found
    twin = _twin(call, wider(origin.dtype))
    if twin is not None:
        evidence[f"in {dtype_name(wider(origin.dtype))}"] = twin
    if twin is not None and origin.dtype.itemsize < 4:
        end = f"{dtype_name(origin.dtype)} ends at {limit(origin.dtype):.6g}"
        found.blamed, found.advice = "precision", RANGE
        found.what = f"{origin.operation} gives {twin:.4g} in float32, and {end}"
        _add_weights(found, call)
        return found
    blamed, what, advice = _explained(base, call, found.index, wrong)
    found.blamed, found.what, found.advice = blamed, what or found.what, advice or found.advice
    if not what:
        _add_weights(found, call)
    return found


def _of_mask(origin: Origin, base: str) -> tuple[Blamed, str, str]:
    if base in ("cross_entropy", "nll_loss", "gather", "take_along_dim", "kl_div", "getitem"):
        what = f"{origin.operation} scores a target whose class a mask blocks"
        return "data", what, "Do not mask classes that are targets, or ignore these targets"
    if origin.kind == "inf":
        return "code", f"infinities of a mask reach the loss through {origin.operation}", "Mask the result as well"
    what = f"a mask blocks every position of a row, and {origin.operation} makes NaN from it"
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


def _twin(call: Call, dtype: torch.dtype) -> float | None:
    """Return the largest magnitude of an operation's result in a wider dtype; None if that is not finite either."""
    try:
        made, _ = run_again(call, dtype)
    except (RuntimeError, TypeError):  # a kernel without this dtype
        return None
    return None if any(map(trouble, made)) else largest(made)


def _explained(base: str, call: Call, index: tuple[int, ...], wrong: Tensor | None) -> tuple[Blamed, str, str]:
    """Return whose fault a result is, why it is not finite, and what to do; empty strings if the rule is not known."""
    value = _value(call, 0, index, wrong)
    if base in ("log", "log2", "log10"):
        advice = "Clamp the argument from below, as by 1e-6, or compute log-probabilities by log_softmax or logsigmoid"
        return "code", f"{base} of {value:.4g}", advice
    if base in ("div", "rdiv", "true_divide", "divide", "reciprocal"):
        return _division(base, call, index, wrong)
    if base in ("mean", "nanmean", "std", "var") and (few := _too_few(base, call)):
        return "data", f"{base} of {few}", "Skip the term if nothing is left to average"
    if base in ("cross_entropy", "nll_loss") and _all_ignored(call):
        return (
            "data",
            f"{base} has no target: each one is ignored",
            "Divide a sum by max(1, targets), or drop such batches",
        )
    if base in ("cross_entropy", "nll_loss"):
        return (
            "code",
            f"{base} of a target whose logit is masked, or that overflows",
            "Do not mask classes that are targets",
        )
    if base in ("sqrt", "rsqrt", "pow", "acos", "asin", "atanh", "log1p", "acosh", "logit"):
        return "code", f"{base} of {value:.4g}", "Clamp its argument to the range where it is finite"
    if base in ("exp", "exp2", "expm1", "sinh", "cosh"):
        advice = "Subtract the maximum first (logsumexp, softmax), or clamp the argument"
        return (
            "code",
            f"{base} of {value:.4g}, which is too large for {dtype_name(wrong.dtype) if wrong is not None else 'it'}",
            advice,
        )
    return "code", "", ""


def _division(base: str, call: Call, index: tuple[int, ...], wrong: Tensor | None) -> tuple[Blamed, str, str]:
    swapped = base in ("rdiv", "reciprocal")
    above, below = (_value(call, one, index, wrong) for one in ((1, 0) if swapped else (0, 1)))
    if below == 0 and above == 0 and wrong is not None and wrong.numel() == 1:
        advice = "Divide by max(1, count), or drop batches without targets"
        return "data", "0 is divided by 0: nothing was counted, as when every target is masked", advice
    return "code", f"{above:.4g} is divided by {below:.4g}", "Add a small number to the divisor, or clamp it from below"


def _value(call: Call, position: int, index: tuple[int, ...], wrong: Tensor | None) -> float:
    """Return the number of an argument that belongs to an index of the result; NaN if there is none."""
    if position >= len(call.args):
        return 1.0 if position == 1 else math.nan  # reciprocal
    given = call.args[position]
    if isinstance(given, int | float):
        return float(given)
    if not isinstance(given, Tensor):
        return math.nan
    if wrong is None or given.dim() > wrong.dim() or not _fits(given, wrong):
        return math.nan
    return float(given.detach().expand(wrong.shape)[index])


def _fits(given: Tensor, wrong: Tensor) -> bool:
    pairs = zip(reversed(given.shape), reversed(wrong.shape), strict=False)
    return all(one in (1, other) for one, other in pairs)


def _too_few(base: str, call: Call) -> str:
    given = call.args[0] if call.args else None
    if not isinstance(given, Tensor) or given.numel() == 0:
        return "no number" if isinstance(given, Tensor) else ""
    return "a single number" if base in ("std", "var") and not any(map(trouble, [given])) else ""


def _all_ignored(call: Call) -> bool:
    targets = call.args[1] if len(call.args) > 1 else call.kwargs.get("target")
    if not isinstance(targets, Tensor) or targets.is_floating_point():
        return False
    ignored = call.kwargs.get("ignore_index", call.args[4] if len(call.args) > 4 else -100)
    return bool((targets == ignored).all())


def _backward(origin: Origin, call: Call) -> Reason:
    name, kind = f"the backward pass of {origin.operation}", _kind(origin.kind)
    found = _unseen(origin)
    gradients = _gradients(call)
    at = next((n for n, gradient in enumerate(gradients) if gradient is not None and trouble(gradient)), None)
    if at is None or origin.operation in (SUM, CHANGED):
        return found
    gradient = gradients[at]
    assert gradient is not None
    found.index, found.shape = first_wrong(gradient), tuple(gradient.shape)
    value = float(list(floats_in((call.args, call.kwargs)))[at].detach()[found.index])
    found.evidence["input"] = value
    found.evidence["not finite"] = f"{int((~gradient.isfinite()).sum()):,} of {gradient.numel():,}"
    wide = [one for one in _gradients(call, wider(origin.dtype)) if one is not None]
    if wide and not any(map(trouble, wide)) and origin.dtype.itemsize < 4:
        size = largest(wide)
        found.evidence["in float32"] = size
        end = f"{dtype_name(origin.dtype)} ends at {limit(origin.dtype):.6g}"
        found.blamed, found.advice = "precision", "Lower the loss scale, or take bf16"
        found.what = f"{name} gives {size:.4g} in float32, and {end}"
        return found
    found.what = f"{name} at {value:.4g} makes {kind} from finite gradients"
    found.advice = ROOTS.get(base_of(origin.operation), "Keep its argument away from this value")
    if abs(value) > 1 and any(map(trouble, call.outputs)):
        found.what = f"{origin.operation} of {value:.4g} is too large for {dtype_name(origin.dtype)}, and {found.what}"
        found.advice = "Scale its input down before, or compute this part in a wider dtype"
    return found


def _gradients(call: Call, dtype: torch.dtype | None = None) -> list[Tensor | None]:
    """Return the gradients of a captured operation's inputs; none if it does not run again."""
    if not call.gradients:
        return []
    try:
        return run_again(call, dtype)[1]
    except (RuntimeError, TypeError):
        return []


EPS = "Add a small number before it, as sqrt(x + 1e-8)"
ROOTS = {
    "sqrt": f"The derivative of a square root at 0 is infinite. {EPS}",
    "pow": "The derivative of a power below 1 at 0 is infinite. Clamp its argument from below",
    "linalg_vector_norm": f"The derivative of a norm at 0 is not defined. {EPS}",
    "norm": f"The derivative of a norm at 0 is not defined. {EPS}",
    "div": "Clamp the divisor from below before dividing",
    "log": "Clamp its argument from below before it: a torch.where after it does not stop the gradient",
    "acos": "Clamp its argument to less than 1 in magnitude",
    "asin": "Clamp its argument to less than 1 in magnitude",
    "std": "The derivative of a standard deviation of equal numbers is infinite. Add a small number to the variance",
}


def _magnitude(size: float, dtype: torch.dtype) -> dict[str, float | int | str]:
    """Return the largest magnitude, the dtype, its limit, and the head room in bits."""
    found: dict[str, float | int | str] = {"largest before": size, "dtype": dtype_name(dtype), "limit": limit(dtype)}
    if size > 0 and math.isfinite(size):
        found["head room in bits"] = round(math.log2(limit(dtype)) - math.log2(size), 2)
    return found


def _kind(kind: str) -> str:
    return "NaN" if kind == "nan" else "infinity"
