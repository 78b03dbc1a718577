"""Runs an operation or a pass again in a wider dtype: what is finite there is not finite for want of range."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rawloop.origin.forward import Call
from rawloop.origin.tensors import floats_in, map_args

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
        args, kwargs = self.widened(args), self.widened(kwargs or {})
        with _no_autocast():
            if name in CASTS and args and isinstance(args[0], Tensor):
                return args[0].to(self.dtype)
            return func(*args, **kwargs)

    def widened(self, value: Any) -> Any:
        """Return arguments with narrow tensors and dtypes replaced."""
        if isinstance(value, torch.dtype):
            return self.dtype if value.is_floating_point and value.itemsize < self.dtype.itemsize else value
        if isinstance(value, dict):
            return {name: self.widened(item) for name, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self.widened(item) for item in value)
        if isinstance(value, Tensor) and value.is_floating_point() and value.dtype.itemsize < self.dtype.itemsize:
            return value.to(self.dtype)
        return value


def run_again(call: Call, dtype: torch.dtype | None = None) -> tuple[list[Tensor], list[Tensor | None]]:
    """Run a captured operation, in a wider dtype if one is given.

    Returns:
        its floating-point outputs; and, if gradients of its outputs were captured, those of its inputs, in the order of
        `floats_in` over its arguments (None for an input that needs none).

    Raises:
        RuntimeError: the operation does not run in that dtype, or not again.
    """
    wide = Wide(dtype) if dtype is not None else None

    def leaf(tensor: Tensor) -> Any:
        made = tensor.detach().clone()
        return (wide.widened(made) if wide is not None else made).requires_grad_(tensor.requires_grad)

    args, kwargs = map_args(leaf, call.args), map_args(leaf, call.kwargs)
    leaves = list(floats_in((args, kwargs)))
    learning = bool(call.gradients)
    with torch.set_grad_enabled(learning):
        # In-place operations do not take leaves.
        used = (
            map_args(lambda t: t.view_as(t) if t.requires_grad else t, (args, kwargs)) if learning else (args, kwargs)
        )
        with wide or nullcontext():
            result = call.func(*used[0], **used[1])
    made = list(floats_in(result)) or list(floats_in(used))[:1]
    if not learning:
        return made, [None] * len(leaves)
    wanted = [one for one in leaves if one.requires_grad]
    roots = [(out, call.gradients[index]) for index, out in enumerate(made) if index in call.gradients]
    found = torch.autograd.grad(
        [out for out, _ in roots],
        wanted,
        [gradient.to(out.dtype) for out, gradient in roots],
        allow_unused=True,
    )
    by_leaf = {id(one): gradient for one, gradient in zip(wanted, found, strict=True)}
    return [out.detach() for out in made], [by_leaf.get(id(one)) for one in leaves]


@contextmanager
def _no_autocast() -> Iterator[None]:
    """Turn autocast off for every device, as a pass may cross devices."""
    with ExitStack() as contexts:
        for device in DEVICES:
            if torch.is_autocast_enabled(device):
                contexts.enter_context(torch.autocast(device, enabled=False))
        yield
