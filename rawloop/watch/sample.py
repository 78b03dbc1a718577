"""A sample of weights, moments and updates, counted on the device and read once."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD

from rawloop.watch.held import FLOATS, Held, read

SAMPLE = 2**14  # numbers of each tensor, evenly spread: a share is known to 0.01


class Sample(NamedTuple):
    """Counts for the tensors of one group, of one dtype."""

    held: list[Held]
    lr: float  # of the update
    state_dtype: torch.dtype
    counts: dict[str, list[float]]  # of each tensor, by the names in `count`

    def share(self, row: str, of: str) -> float:
        """Return the quotient of two counts over all tensors; 0.0 if there are none."""
        total = sum(self.counts[of])
        return sum(self.counts[row]) / total if total else 0.0

    def first(self, row: str, of: str, limit: float) -> Held:
        """Return the first tensor whose own share is above the limit."""
        rows = zip(self.held, self.counts[row], self.counts[of], strict=True)
        return next(one for one, count, total in rows if total and count / total > limit)

    def ratio(self, place: int) -> float:
        """Return the rms of a tensor's update divided by that of its weights before it; 0.0 for zero weights."""
        update, weight = self.counts["update squared"][place], self.counts["weight squared"][place]
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
    """Yield samples of those tensors of a group whose update can be computed, one for each dtype and device.

    `lr` is of the update, and `scale` the factor on the gradients of plain SGD.
    """
    alike: dict[tuple[object, ...], list[tuple[Held, Tensor]]] = {}
    for one in held:
        moment = first_moment(one)
        if moment is not None:
            key = (one.parameter.dtype, moment.dtype, one.parameter.device, is_adam(one))
            alike.setdefault(key, []).append((one, moment))
    for pairs in alike.values():
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
    """Count numbers in a sample of every tensor."""
    dtype, state_dtype, group = held[0].parameter.dtype, moments[0].dtype, held[0].group
    wide = torch.promote_types(dtype, torch.float32)
    weight, moment = chosen([one.numbers for one in held], wide), chosen(moments, wide) / scale
    sizes = torch.tensor([len(spread(one.numbers)) for one in held], device=weight.device)
    owner = torch.repeat_interleave(torch.arange(len(held), device=weight.device), sizes)
    update, second, zero = lr * moment, torch.zeros_like(weight), torch.zeros_like(weight)
    still = drowned = zero != 0
    if is_adam(held[0]):
        betas, eps = [float(beta) for beta in group["betas"]], float(group["eps"])
        name = "max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"
        second = chosen([one.state[name] for one in held], wide)
        steps = read([torch.as_tensor(one.state["step"], dtype=torch.float64).reshape(()) for one in held])
        factors = torch.tensor([[1 - beta ** max(step, 1) for beta in betas[:2]] for step in steps], dtype=wide)
        first_factor, second_factor = factors.to(weight.device).clamp(min=1e-12)[owner].unbind(1)
        root = (second / second_factor).sqrt()
        update = lr * moment / first_factor / (root + eps)
        zero = (moment != 0) & (second == 0)
        still = (second != 0) & ((second * betas[1]).to(state_dtype).to(wide) == second)
        drowned = (second != 0) & (root < eps)
    rows = {
        "active": moment != 0,  # numbers with a first moment, which unused rows of embeddings do not have
        # the weight stays as it is; of a stand-in, which is float32: before its update is rounded at random
        "lost": (moment != 0) & ((weight - update).to(dtype).to(wide) == weight),
        "zero": zero,  # of the active ones: the second moment is zero
        "moving": second != 0,
        "still": still,  # of the moving ones: beta2 times the second moment rounds to itself
        "drowned": drowned,  # of the moving ones: the root is below eps
        "update squared": update.square(),
        "weight squared": (weight if is_plain_sgd(held[0]) else weight + update).square(),  # before the update
    }
    counts = torch.zeros(len(rows), len(held), dtype=wide, device=weight.device)
    counts.index_add_(1, owner, torch.stack([row.to(wide) for row in rows.values()]))
    return Sample(held, lr, state_dtype, dict(zip(rows, counts.tolist(), strict=True)))


def spread(tensor: Tensor) -> Tensor:
    """Return at most `SAMPLE` numbers of a tensor, evenly spread. An odd stride takes from all columns."""
    return tensor.detach().reshape(-1)[:: -(-tensor.numel() // SAMPLE) | 1]


def chosen(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the samples of several tensors in one."""
    return torch.cat([spread(tensor) for tensor in tensors]).to(dtype)
