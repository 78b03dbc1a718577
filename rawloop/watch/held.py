"""What optimizers hold, by name, and reading many numbers from the device at once."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rawloop.rounding import weight_behind
from rawloop.watch.findings import Cause, Finding, Place, Whose
from rawloop.watch.subject import Subject

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HALF = (torch.float16, torch.bfloat16)
MASTER = "master of "  # before a weight's name: the optimizer's float32 parameter in its place
Evidence = dict[str, float | int | str]


class Held(NamedTuple):
    """A parameter that an optimizer holds."""

    name: str  # in `Subject.named`, or its place in the optimizer if it has none
    parameter: nn.Parameter  # with float32 masters it is not the model's; a stand-in has no numbers between updates
    weight: nn.Parameter  # the model's of that name, on which backward puts the gradient; else the parameter
    optimizer: Optimizer
    group: dict[str, Any]
    label: str  # the optimizer and the group's index, such as `AdamW group 0`

    @property
    def key(self) -> str:
        """A name that a master does not share with its weight."""
        return self.name if self.weight is self.numbers else f"{MASTER}{self.name}"

    @property
    def numbers(self) -> Tensor:
        """Its numbers between updates: those of the weight that it stands in for, else its own."""
        return weight_behind(self.parameter)

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
    return found | {one.key: one.numbers for one in held_by_optimizers(subject)}


def measurable(tensor: Tensor) -> bool:
    """Whether a tensor holds floats in ordinary memory of this rank: not quantised, sparse, on meta, or a shard."""
    sharded = hasattr(tensor, "placements") or getattr(tensor, "_is_flat_param", False)  # FSDP
    plain = tensor.layout is torch.strided and not tensor.is_meta and not sharded
    return plain and tensor.dtype in FLOATS and tensor.numel() > 0


def largest(tensors: Sequence[Tensor]) -> list[float]:
    """Return the largest magnitude in each tensor; NaN if it has one."""
    return norms(tensors, math.inf)


def rms_of(tensors: Sequence[Tensor]) -> list[float]:
    """Return the root mean square of each tensor."""
    return [norm / math.sqrt(tensor.numel()) for norm, tensor in zip(norms(tensors, 2), tensors, strict=True)]


def norms(tensors: Sequence[Tensor], order: float) -> list[float]:
    """Return a norm of each tensor, computed in float32 or more."""
    pairs = [(tensor.detach(), torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]
    return read([torch.linalg.vector_norm(tensor, order, dtype=wide) for tensor, wide in pairs])


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


def told(
    subject: Subject, step: int, kind: str, whose: Whose, what: str, place: Place, evidence: Evidence, advice: str = "",
    *, since: int | None = None, ordinary: bool = False,
) -> Finding:  # fmt: skip
    """Return a finding with one cause, which its own sentence tells."""
    cause = Cause(whose, what, place, evidence, advice)
    return Finding(kind, what, (cause,), step, subject.world.rank, ordinary, since)
