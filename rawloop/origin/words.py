"""Says in words why an operation makes numbers that are not finite, and what to do about it."""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from rawloop.origin.find import Origin
from rawloop.origin.forward import Call
from rawloop.origin.tensors import dtype_name, first_wrong, floats_in, largest, limit, trouble
from rawloop.origin.twin import run_again, wider

Blamed = Literal["data", "code", "precision"]
RANGE = "take bf16, or scale the input of this operation down"


@dataclass
class Reason:
    """Why an operation makes numbers that are not finite.

    Args:
        blamed: `code` is the model or the loss.
        what: one sentence.
        advice: what to do.
        evidence: numbers.
        index: of the first number in the operation's output that is not finite; empty if unknown.
        shape: of that output.
    """

    blamed: Blamed
    what: str
    advice: str = ""
    evidence: dict[str, float | int | str] = field(default_factory=dict)
    index: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()


def reason(origin: Origin) -> Reason:
    """Return why an origin is one, from its captured operation if there is one."""
    if origin.given:
        return Reason("data", f"{origin.given} contains {_kind(origin.kind)}", "Drop or repair this sample")
    call = origin.call
    if call is None:
        return _unseen(origin)
    return _forward(origin, call) if origin.phase == "forward" else _backward(origin, call)


def _unseen(origin: Origin) -> Reason:
    if origin.parameter:
        return Reason(
            "precision" if origin.dtype.itemsize < 4 else "code",
            f"gradients of '{origin.parameter}' are finite one by one, and their sum is not",
            "Lower the loss scale, or keep this weight in float32",
            _magnitude(origin.gradient, origin.dtype),
        )
    name = origin.operation or "an operation"
    if origin.phase == "backward":
        what = f"the backward pass of {name} makes {_kind(origin.kind)} from finite gradients"
        return Reason("code", what, "", _magnitude(origin.gradient, origin.dtype))
    return Reason(
        "code", f"{name} makes {_kind(origin.kind)} from finite inputs", "", {"dtype": dtype_name(origin.dtype)}
    )


def _forward(origin: Origin, call: Call) -> Reason:
    inputs = list(floats_in((call.args, call.kwargs)))
    wrong = next((out for out in call.outputs if trouble(out)), None)
    evidence = _magnitude(largest(inputs), origin.dtype)
    index, shape = ((), ()) if wrong is None else (first_wrong(wrong), tuple(wrong.shape))
    if wrong is not None:
        evidence["not finite"] = f"{int((~wrong.isfinite()).sum()):,} of {wrong.numel():,}"
    if origin.blocked:
        what = f"a mask blocks every position of a row, and {origin.operation} makes {_kind(origin.kind)} from it"
        advice = "Give every row at least one position that is not masked, or drop the sample"
        return Reason("data", what, advice, evidence, index, shape)
    if origin.dtype.itemsize < 4 and (size := _twin(call, wider(origin.dtype))) is not None:
        evidence["in float32"] = size
        end = f"{dtype_name(origin.dtype)} ends at {limit(origin.dtype):.4g}"
        what = f"{origin.operation} gives {size:.4g} in float32, and {end}"
        return Reason("precision", what, RANGE, evidence, index, shape)
    blamed, what, advice = _explained(_base(origin.operation), call, index, wrong)
    return Reason(
        blamed,
        what or f"{origin.operation} makes {_kind(origin.kind)} from finite inputs",
        advice,
        evidence,
        index,
        shape,
    )


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
    base, evidence = _base(origin.operation), _magnitude(origin.gradient, origin.dtype)
    _, gradients = run_again(call) if call.gradients else ([], [])
    inputs = list(floats_in((call.args, call.kwargs)))
    at = next((n for n, g in enumerate(gradients) if g is not None and trouble(g)), None)
    index: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()
    name = f"the backward pass of {origin.operation}"
    if at is None:
        return Reason("code", f"{name} makes {_kind(origin.kind)} from finite gradients", "", evidence)
    gradient = gradients[at]
    assert gradient is not None
    index, shape = first_wrong(gradient), tuple(gradient.shape)
    value = float(inputs[at].detach()[index])
    evidence["input"] = value
    evidence["not finite"] = f"{int((~gradient.isfinite()).sum()):,} of {gradient.numel():,}"
    advice = ROOTS.get(base, "")
    what = f"{name} at {value:.4g} makes {_kind(origin.kind)} from finite gradients"
    return Reason("code", what, advice, evidence, index, shape)


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


def _base(operation: str) -> str:
    """`torch.Tensor.log_` -> `log`, `torch.Tensor.__rtruediv__` -> `rdiv`."""
    name = operation.rpartition(".")[2].strip("_")
    return {"rtruediv": "rdiv", "truediv": "div", "itruediv": "div"}.get(name, name)


def _kind(kind: str) -> str:
    return "NaN" if kind == "nan" else "infinity"
