"""Tensors in the arguments and results of operations, and the numbers in them that are not finite."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def floats_in(value: Any) -> Iterator[Tensor]:
    """Yield the strided floating-point tensors with numbers in lists, tuples, mappings, dataclasses, and nests."""
    if isinstance(value, Tensor):
        if _readable(value):
            yield value
        return
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    elif isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return
    for item in value:
        yield from floats_in(item)


def _readable(tensor: Tensor) -> bool:
    return (
        tensor.is_floating_point()
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and tensor.layout == torch.strided
        and tensor.device.type != "meta"
        and tensor.numel() > 0
    )


def trouble(tensor: Tensor) -> str:
    """Return `nan`, `inf` (infinities, and no NaN), or an empty string. This waits for the device."""
    tensor = tensor.detach()
    if bool(tensor.isfinite().all()):
        return ""
    return "nan" if bool(tensor.isnan().any()) else "inf"


def largest(tensors: Iterable[Tensor]) -> float:
    """Return the largest finite magnitude; NaN without a finite number."""
    found = [t.detach().abs().nan_to_num(0.0, 0.0, 0.0).amax().item() for t in tensors]
    return max(found, default=math.nan)


def first_wrong(tensor: Tensor) -> tuple[int, ...]:
    """Return the index of the first number that is not finite."""
    flat = (~tensor.detach().isfinite()).flatten().int().argmax()
    return tuple(int(i) for i in torch.unravel_index(flat, tensor.shape))


def map_args(change: Callable[[Any], Any], value: Any) -> Any:
    """Return arguments of an operation, in dicts, lists and tuples, with each one changed."""
    if isinstance(value, dict):
        return {name: map_args(change, item) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map_args(change, item) for item in value)
    return change(value)


def base_of(operation: str) -> str:
    """Return the bare name of an operation: `torch.Tensor.log_` -> `log`, `torch.Tensor.__rtruediv__` -> `rdiv`."""
    name = operation.rpartition(".")[2].strip("_")
    return {"rtruediv": "rdiv", "truediv": "div", "itruediv": "div"}.get(name, name)


def dtype_name(dtype: torch.dtype) -> str:
    """`float16`."""
    return str(dtype).removeprefix("torch.")


def limit(dtype: torch.dtype) -> float:
    """Return the largest finite number of a dtype."""
    return torch.finfo(dtype).max
