"""Optimizers that do not know sharded weights, made to update them.

An optimizer that computes each number alone updates this rank's part of a weight. One that reads whole matrices gets
the whole weights, one after the other.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rawloop.sharding import gathered, is_sharded, part_of, sharded_as, sharded_from, write_part

BLOCK = 256  # numbers that share a scale in the 8-bit state of bitsandbytes
SCALES = {"absmax1": ("state1", "qmap1"), "absmax2": ("state2", "qmap2")}  # scales -> codes, and what these stand for
TABLES = {table for _, table in SCALES.values()}  # of 256 numbers, whole on all ranks


class OfParts(Optimizer):
    """An optimizer of sharded weights, each of whose numbers is updated from its own gradient and state alone.

    Groups and state are those of the weights: state of a part is sharded as its weight is.

    Args:
        inner: built over the weights. From then on only its `step` is used.
    """

    def __init__(self, inner: Optimizer) -> None:
        self._inner = (inner,)  # not as an attribute of its own: masters replace the weights in these groups alone
        super().__init__(inner.param_groups, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all weights that have a gradient. The closure, if any, is called once before."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._update(group, [weight for weight in group["params"] if weight.grad is not None])
        return loss

    def _update(self, group: dict[str, Any], weights: list[nn.Parameter]) -> None:
        """Let the inner optimizer update stand-ins for weights, and keep its state as that of the weights."""
        inner, stand_ins = self._inner[0], [nn.Parameter(self._taken(weight.detach())) for weight in weights]
        inner.state = defaultdict(dict)
        for weight, stand_in in zip(weights, stand_ins, strict=True):
            assert weight.grad is not None
            stand_in.grad = self._taken(weight.grad)
            if state := self._state_before(weight):
                inner.state[stand_in] = {k: self._taken(v) if isinstance(v, Tensor) else v for k, v in state.items()}
        inner.param_groups = [{**group, "params": stand_ins}]
        inner.step()
        group |= {key: value for key, value in inner.param_groups[0].items() if key != "params"}
        for weight, stand_in in zip(weights, stand_ins, strict=True):
            self._keep(weight, stand_in, inner.state[stand_in])

    def _state_before(self, weight: nn.Parameter) -> Mapping[str, Any]:
        state: Mapping[str, Any] = self.state.get(weight, {})
        return state

    def _taken(self, tensor: Tensor) -> Tensor:
        """Return this rank's part. A kernel may fail on no numbers, so they are replaced by one."""
        own = part_of(tensor)
        return own if own.numel() else own.new_zeros((1,) * own.ndim)

    def _keep(self, weight: nn.Parameter, stand_in: nn.Parameter, state: Mapping[str, Any]) -> None:
        part = part_of(weight.detach())
        kept = dict(state)
        for key, value in state.items():
            if key not in TABLES and getattr(value, "shape", None) == stand_in.shape:
                kept[key] = sharded_from(value if part.numel() else value.new_empty(part.shape), weight)
            elif key in SCALES:
                kept[key] = sharded_from(value, weight, (weight.numel() // BLOCK,))
        self.state[weight] = kept


class Of8BitParts(OfParts):
    """An optimizer of bitsandbytes with 8-bit state over parts of weights.

    A part keeps 32-bit state if its blocks would not be those of the whole weight: then no other cut of the weight,
    and so no other number of processes, could read its state.
    """

    def _state_before(self, weight: nn.Parameter) -> Mapping[str, Any]:
        if (state := super()._state_before(weight)) or has_whole_blocks(weight):
            return state
        part = self._taken(weight.detach())
        return {"step": 0, **{name: torch.zeros_like(part, dtype=torch.float32) for name in ("state1", "state2")}}


class OfWholes(OfParts):
    """An optimizer that reads whole matrices, of sharded weights. All ranks step together.

    A weight is gathered with its gradient and state, updated on every rank, and each rank keeps its part. State of
    another shape, such as means of rows, is whole on all ranks. This takes the memory of one weight.
    """

    def _update(self, group: dict[str, Any], weights: list[nn.Parameter]) -> None:
        for weight in weights:
            super()._update(group, [weight])

    def _taken(self, tensor: Tensor) -> Tensor:
        return gathered(tensor)

    def _keep(self, weight: nn.Parameter, stand_in: nn.Parameter, state: Mapping[str, Any]) -> None:
        write_part(weight, stand_in)
        self.state[weight] = {
            key: sharded_as(value, weight).clone() if getattr(value, "shape", None) == weight.shape else value
            for key, value in state.items()
        }


def has_whole_blocks(weight: Tensor) -> bool:
    """Return whether all ranks have as many numbers of a sharded weight, in blocks of `BLOCK`."""
    sharded: Any = weight
    size: int = sharded.device_mesh.size()
    return weight.shape[0] % size == 0 and (weight.numel() // size) % BLOCK == 0


def state_for(values: Mapping[str, Any], weight: Tensor) -> dict[str, Any]:
    """Return the stored state of a whole weight as that of the weight: cut, if the weight is sharded.

    8-bit state of a weight whose parts have no whole blocks becomes the 32-bit numbers that it stands for.
    """
    if not is_sharded(weight):
        return dict(values)
    if SCALES.keys() & values.keys() and not has_whole_blocks(weight):
        values = _in_32_bits(values)
    cut = [key for key, value in values.items() if key in SCALES or getattr(value, "shape", None) == weight.shape]
    return {key: sharded_as(value, weight) if key in cut else value for key, value in values.items()}


def _in_32_bits(values: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(values)
    for scales, (codes, table) in SCALES.items():
        if scales in values:
            scale, shape = found.pop(scales).repeat_interleave(BLOCK), values[codes].shape
            numbers = found.pop(table)[values[codes].flatten().int()]
            found[codes] = (numbers * scale[: numbers.numel()]).view(shape)
    return found
