"""The names of a model's weights, kept between steps, and read again if the model has other ones."""

import weakref
from itertools import chain
from operator import is_
from typing import Any

from torch import Tensor, nn


class NamedWeights:
    """Returns a model's parameters with their names. Reading them all takes ten times as long as comparing."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._dicts: list[dict[str, Any]] = []  # the weights and the parts of each module
        self._parts: list[Any] = []  # what they held
        self._named: list[tuple[str, nn.Parameter]] = []

    def __call__(self) -> list[tuple[str, nn.Parameter]]:
        """Return the parameters that the model has now."""
        parts = list(chain.from_iterable(map(dict.values, self._dicts)))
        if not self._dicts or len(parts) != len(self._parts) or not all(map(is_, parts, self._parts)):
            self._dicts = [d for m in self.model.modules() for d in (m._parameters, m._modules)]
            self._parts = list(chain.from_iterable(map(dict.values, self._dicts)))
            self._named = list(self.model.named_parameters())
        return self._named


class TensorNames:
    """The names of a model's weights and buffers. A weight that is assigned later is looked up once."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.found: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        self._read()

    def _read(self) -> None:
        for named in (self.model.named_buffers(), self.model.named_parameters()):
            self.found.update({id(tensor): (weakref.ref(tensor), name) for name, tensor in named})

    def __call__(self, tensor: Tensor) -> str:
        """Return the name of a weight or buffer; empty if the tensor is none."""
        name = self._known(tensor)
        if name is None and isinstance(tensor, nn.Parameter):
            self.found[id(tensor)] = weakref.ref(tensor), ""
            self._read()
            name = self._known(tensor)
        return name or ""

    def _known(self, tensor: Tensor) -> str | None:
        alive, name = self.found.get(id(tensor), (None, None))
        return name if alive is not None and alive() is tensor else None
