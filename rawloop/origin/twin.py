"""Runs an operation or a pass again in a wider dtype: what is finite there is not finite for want of range."""

from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rawloop.origin.spots import Call
from rawloop.origin.tensors import floats_in, map_args
from rawloop.seed import preserved_rng

DEVICES = ("cpu", "cuda", "mps", "xpu")
CASTS = ("half", "bfloat16", "float")


def wider(dtype: torch.dtype) -> torch.dtype:
    """Return float32 for 16-bit dtypes, float64 for float32."""
    return torch.float32 if dtype.itemsize < 4 else torch.float64


class Wide(TorchFunctionMode):
    """Runs every operation inside in a wider dtype, without autocast; weights and inputs keep their values."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return func(*args, **(kwargs or {}))
        args, kwargs = map_args(self.widened, args), map_args(self.widened, kwargs or {})
        with ExitStack() as contexts:
            for device in filter(torch.is_autocast_enabled, DEVICES):  # a pass may cross devices
                contexts.enter_context(torch.autocast(device, enabled=False))
            if name in CASTS and args and isinstance(args[0], Tensor):
                return args[0].to(self.dtype)
            return func(*args, **kwargs)

    def widened(self, value: Any) -> Any:
        """Return this dtype for a narrower floating-point tensor or dtype; other values stay."""
        dtype = value if isinstance(value, torch.dtype) else getattr(value, "dtype", None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize >= self.dtype.itemsize:
            return value
        return value.to(self.dtype) if isinstance(value, Tensor) else self.dtype


def run_again(call: Call, dtype: torch.dtype | None = None) -> tuple[list[Tensor], list[Tensor | None]] | None:
    """Run a captured operation, in a wider dtype if one is given. The random streams are as before when it returns.

    Returns:
        its floating-point outputs; and, if gradients of its outputs were captured, those of its inputs, in the order of
        `floats_in` over its arguments (None for an input that needs none). None if it does not run so, as a kernel may
        not know the dtype.
    """
    wide = Wide(dtype) if dtype is not None else None
    learning = bool(call.gradients)
    copies: list[Tensor] = []

    def copied(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        made = value.detach().clone()
        copies.append((made if wide is None else wide.widened(made)).requires_grad_(learning and value.requires_grad))
        return copies[-1].view_as(copies[-1]) if copies[-1].requires_grad else copies[-1]  # in-place: no leaves

    try:
        with preserved_rng(), torch.set_grad_enabled(learning):  # dropout draws
            args, kwargs = map_args(copied, (call.args, call.kwargs))
            with wide or nullcontext():
                result = call.func(*args, **kwargs)
            made = list(floats_in(result)) or list(floats_in((args, kwargs)))[:1]
            return [out.detach() for out in made], _gradients(call, made, list(floats_in(copies))) if learning else []
    except (RuntimeError, TypeError):
        return None


def _gradients(call: Call, made: list[Tensor], inputs: list[Tensor]) -> list[Tensor | None]:
    wanted = [one for one in inputs if one.requires_grad]
    roots = [out for index, out in enumerate(made) if index in call.gradients]
    given = [call.gradients[index].to(out.dtype) for index, out in enumerate(made) if index in call.gradients]
    found = torch.autograd.grad(roots, wanted, given, allow_unused=True)
    by_input = dict(zip(map(id, wanted), found, strict=True))
    return [by_input.get(id(one)) for one in inputs]
