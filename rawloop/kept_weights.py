"""Copies of weights that a pass writes, taken before the first write, so that a repeated pass leaves no trace."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass


class KeptWeights(TorchDispatchMode):
    """Copies each weight before the first operation that writes to its memory, as a momentum encoder's is in forward.

    Nothing is copied in a pass that writes no weight. An operation costs some microseconds more.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        plain = [weight for weight in weights if weight.layout is torch.strided and not _is_wrapper(weight)]
        self._weights = [(weight, weight.data, weight._version) for weight in plain]
        self._at: dict[int, list[Tensor]] = {}  # by memory
        for weight, data, _ in self._weights:
            self._at.setdefault(weight.untyped_storage()._cdata, []).append(data)
        self._copies: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, after a copy of the weights that it writes."""
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for number, argument in enumerate(func._schema.arguments):
                if argument.is_write:
                    self._keep(args[number] if number < len(args) else kwargs.get(argument.name))
        return func(*args, **kwargs)

    def _keep(self, value: Any) -> None:
        for tensor in value if isinstance(value, list | tuple) else [value]:
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                found = self._at.pop(tensor.untyped_storage()._cdata, ())
                self._copies += [(data, data.clone()) for data in found]

    def restore(self) -> None:
        """Restore the weights: their memory, its values, and the versions by which autograd notices writes."""
        for data, copy in self._copies:
            data.copy_(copy)
        for weight, data, version in self._weights:
            if weight.data_ptr() != data.data_ptr() or weight.shape != data.shape:
                weight.data = data
            if weight._version != version:
                torch._C._autograd._unsafe_set_version_counter((weight,), (version,))


def _is_wrapper(tensor: Any) -> bool:
    """Return whether a tensor has its memory in others, as a DTensor does."""
    return is_traceable_wrapper_subclass(tensor)
