"""What optimizers hold, by name, and reading many numbers from the device at once."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rawloop.watch.findings import Place
from rawloop.watch.subject import Subject

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HALF = (torch.float16, torch.bfloat16)
MASTER = "master of "  # before a weight's name: the optimizer's float32 parameter in its place
Evidence = dict[str, float | int | str]


class Held(NamedTuple):
    """A parameter that an optimizer holds.

    Args:
        name: its name in `Subject.named`, or its place in the optimizer if it has none.
        parameter: the parameter. With float32 masters it is not the model's.
        weight: the model's weight of that name, on which backward puts the gradient; else the parameter.
        optimizer: the optimizer.
        group: its parameter group.
        label: the optimizer and the group's index, such as `AdamW group 0`.
    """

    name: str
    parameter: nn.Parameter
    weight: nn.Parameter
    optimizer: Optimizer
    group: dict[str, Any]
    label: str

    @property
    def key(self) -> str:
        """A name that a master does not share with its weight."""
        return self.name if self.weight is self.parameter else f"{MASTER}{self.name}"

    @property
    def place(self) -> Place:
        """The place of a finding about it."""
        return place_of(self.name, optimizer=self.label)

    @property
    def state(self) -> dict[str, Any]:
        """The optimizer's state for it, empty before the first update."""
        return self.optimizer.state.get(self.parameter) or {}

    @property
    def gradient(self) -> Tensor | None:
        """Its gradient, multiplied by the loss scale if it lies on the model's weight. A sparse one is made dense."""
        found = self.weight.grad if self.parameter.grad is None else self.parameter.grad
        return found.to_dense() if found is not None and found.is_sparse else found


def held_by_optimizers(subject: Subject) -> list[Held]:
    """Return the parameters that the optimizers hold and that can be measured here, in order."""
    names = {id(parameter): name for name, parameter in subject.named()}
    weights = dict(subject.model.named_parameters())
    found = []
    for label, optimizer, group in groups_of(subject):
        for position, parameter in enumerate(group["params"]):
            name = names.get(id(parameter), f"{label}, parameter {position}")
            if measurable(parameter):
                found.append(Held(name, parameter, weights.get(name, parameter), optimizer, group, label))
    return found


def groups_of(subject: Subject) -> list[tuple[str, Optimizer, dict[str, Any]]]:
    """Return all parameter groups with a name: `AdamW group 0`, or `AdamW[1] group 0` of the second optimizer."""
    several = len(subject.optimizers) > 1
    return [
        (f"{type(one).__name__}{f'[{place}]' if several else ''} group {index}", one, group)
        for place, one in enumerate(subject.optimizers)
        for index, group in enumerate(one.param_groups)
    ]


def by_label(held: Iterable[Held]) -> dict[str, list[Held]]:
    """Return the parameters of each group, under the group's label."""
    groups: dict[str, list[Held]] = {}
    for one in held:
        groups.setdefault(one.label, []).append(one)
    return groups


def weights_of(subject: Subject) -> dict[str, Tensor]:
    """Return the model's weights, and the optimizers' parameters that are not among them (masters), by name."""
    found: dict[str, Tensor] = {name: p for name, p in subject.model.named_parameters() if measurable(p)}
    return found | {one.key: one.parameter for one in held_by_optimizers(subject)}


def measurable(tensor: Tensor) -> bool:
    """Whether a tensor holds floats in ordinary memory of this rank: not quantised, sparse, on meta, or a shard."""
    sharded = hasattr(tensor, "placements") or getattr(tensor, "_is_flat_param", False)  # FSDP
    plain = tensor.layout is torch.strided and not tensor.is_meta and not sharded
    return plain and tensor.dtype in FLOATS and tensor.numel() > 0


def norms(tensors: Sequence[Tensor], order: float) -> list[Tensor]:
    """Return a norm of each tensor as a 0-dim tensor, computed in float32 or more."""
    made: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        chosen = [(place, tensor.detach()) for place, tensor in enumerate(tensors) if tensor.dtype == dtype]
        wide = torch.promote_types(dtype, torch.float32)
        values = torch._foreach_norm([tensor for _, tensor in chosen], order, dtype=wide)
        made.update(zip([place for place, _ in chosen], values, strict=True))
    return [made[place] for place in range(len(tensors))]


def largest(tensors: Sequence[Tensor]) -> list[float]:
    """Return the largest magnitude in each tensor; NaN if it has one."""
    return read(norms(tensors, math.inf))


def rms_of(tensors: Sequence[Tensor]) -> list[float]:
    """Return the root mean square of each tensor."""
    pairs = zip(read(norms(tensors, 2)), tensors, strict=True)
    return [norm / math.sqrt(tensor.numel()) for norm, tensor in pairs]


def read(values: Sequence[Tensor]) -> list[Any]:
    """Read 0-dim or equally long tensors, with one wait for each device and dtype."""
    found: dict[int, Any] = {}
    for key in dict.fromkeys((value.device, value.dtype) for value in values):
        places = [place for place, value in enumerate(values) if (value.device, value.dtype) == key]
        found.update(zip(places, torch.stack([values[place] for place in places]).tolist(), strict=True))
    return [found[place] for place in range(len(values))]


def place_of(name: str, **more: Any) -> Place:
    """Return the place of a finding about a weight, or about the optimizer's master of it."""
    name = name.removeprefix(MASTER)
    return Place(phase="update", module=name.rpartition(".")[0], parameter=name, **more)


def short(dtype: torch.dtype) -> str:
    """Return a dtype as people write it, such as `float32`."""
    return str(dtype).removeprefix("torch.")
