"""A sample of weights, moments and updates, counted on the device and read once."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD

from rawloop.watch.held import FLOATS, Held, number, read

SAMPLE = 2**14  # numbers of each tensor, evenly spread: a share is known to 0.01
ROWS = (
    "active",  # numbers with a first moment, which unused rows of embeddings do not have
    "lost",  # of these: the update leaves the weight as it is
    "zero",  # of these: the second moment is zero
    "moving",  # numbers with a second moment
    "still",  # of these: beta2 times the second moment rounds to itself
    "drowned",  # of these: the root is below eps
    "update2",  # squares
    "weight2",
    "moment2",
    "pushed2",  # of the first moment without coupled weight decay
)


class Sample(NamedTuple):
    """Counts for the tensors of one group, of one dtype.

    Args:
        held: the tensors.
        lr: the learning rate of the update.
        betas: of Adam; zeros for SGD.
        eps: of Adam; 0 for SGD.
        dtype: of the weights.
        state_dtype: of the moments.
        counts: of each tensor, in order of `ROWS`.
    """

    held: list[Held]
    lr: float
    betas: tuple[float, float]
    eps: float
    dtype: torch.dtype
    state_dtype: torch.dtype
    counts: list[list[float]]

    def total(self, row: str) -> float:
        """Return a count over all tensors."""
        return sum(self.counts[ROWS.index(row)])

    def share(self, row: str, of: str) -> float:
        """Return the quotient of two counts; 0.0 if there are none."""
        return self.total(row) / self.total(of) if self.total(of) else 0.0

    def first(self, row: str, of: str, limit: float) -> int:
        """Return the index of the first tensor whose own share is above the limit."""
        pairs = zip(self.counts[ROWS.index(row)], self.counts[ROWS.index(of)], strict=True)
        return next(place for place, (count, total) in enumerate(pairs) if total and count / total > limit)

    def ratio(self, place: int) -> float:
        """Return the rms of a tensor's update divided by that of its weights; 0.0 for zero weights."""
        update, weight = (self.counts[ROWS.index(row)][place] for row in ("update2", "weight2"))
        return float((update / weight) ** 0.5) if weight else 0.0


def is_adam(held: Held) -> bool:
    """Whether the optimizer updates with Adam's moments and has made an update."""
    moments = [held.state.get(name) for name in ("exp_avg", "exp_avg_sq")]
    whole = all(isinstance(m, Tensor) and m.shape == held.parameter.shape and m.dtype in FLOATS for m in moments)
    return whole and {"lr", "betas", "eps"} <= held.group.keys() and "step" in held.state


def is_plain_sgd(held: Held) -> bool:
    """Whether the update is the gradient times the learning rate."""
    return isinstance(held.optimizer, SGD) and not held.group.get("momentum")


def sampled(held: list[Held], lr: float, scale: float) -> Iterator[Sample]:
    """Yield samples of those tensors whose update can be computed, one for each dtype and device.

    Args:
        held: of one group.
        lr: the learning rate of the update.
        scale: the factor on the gradients of plain SGD.
    """
    chosen: dict[tuple[object, ...], list[tuple[Held, Tensor]]] = {}
    for one in held:
        moment = first_moment(one)
        if moment is not None:
            key = (one.parameter.dtype, moment.dtype, one.parameter.device, is_adam(one))
            chosen.setdefault(key, []).append((one, moment))
    for pairs in chosen.values():
        yield count([one for one, _ in pairs], [moment for _, moment in pairs], lr, scale)


def first_moment(held: Held) -> Tensor | None:
    """Return what the optimizer follows: Adam's first moment, SGD's buffer or gradient; None if it is not known."""
    if is_adam(held):
        found = held.state["exp_avg"]
    elif isinstance(held.optimizer, SGD):
        found = held.gradient if is_plain_sgd(held) else held.state.get("momentum_buffer")
    else:
        return None
    usable = isinstance(found, Tensor) and found.layout is torch.strided and found.shape == held.parameter.shape
    return found if usable else None


@torch.no_grad()
def count(held: list[Held], moments: list[Tensor], lr: float, scale: float) -> Sample:
    """Count what `ROWS` names in a sample of every tensor."""
    dtype, state_dtype = held[0].parameter.dtype, moments[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    weight, moment = chosen([one.parameter for one in held], wide), chosen(moments, wide) / scale
    adam, group = is_adam(held[0]), held[0].group
    sizes = torch.tensor([len(spread(one.parameter)) for one in held], device=weight.device)
    owner = torch.repeat_interleave(torch.arange(len(held), device=weight.device), sizes)
    betas, eps, second = (0.0, 0.0), 0.0, torch.zeros_like(weight)
    direction = moment
    if adam:
        betas, eps = (number(group["betas"][0]), number(group["betas"][1])), number(group["eps"])
        name = "max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"
        second = chosen([one.state[name] for one in held], wide)
        steps = read([torch.as_tensor(one.state["step"], dtype=torch.float64).reshape(()) for one in held])
        factors = torch.tensor([[1 - beta ** max(step, 1) for beta in betas] for step in steps], dtype=wide)
        first, root = factors.to(weight.device).clamp(min=1e-12)[owner].unbind(1)
        moment = moment / first
        root = (second / root).sqrt()
        direction = moment / (root + eps)
        drowned = (second != 0) & (root < eps)
    else:
        drowned = second != 0
    update, active, moving = lr * direction, moment != 0, second != 0
    rows = [
        active,
        active & ((weight - update).to(dtype).to(wide) == weight),
        active & (second == 0) & adam,
        moving,
        moving & ((second * betas[1]).to(state_dtype).to(wide) == second),
        drowned,
        update.square(),
        weight.square(),
        moment.square(),
        (moment - number(group.get("weight_decay", 0.0)) * weight).square(),
    ]
    counts = torch.zeros(len(rows), len(held), dtype=wide, device=weight.device)
    counts.index_add_(1, owner, torch.stack([row.to(wide) for row in rows]))
    return Sample(held, lr, betas, eps, dtype, state_dtype, counts.tolist())


def spread(tensor: Tensor) -> Tensor:
    """Return at most `SAMPLE` numbers of a tensor, evenly spread. An odd stride takes from all columns."""
    return tensor.detach().reshape(-1)[:: -(-tensor.numel() // SAMPLE) | 1]


def chosen(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the samples of several tensors in one."""
    return torch.cat([spread(tensor) for tensor in tensors]).to(dtype)
