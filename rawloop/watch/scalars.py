"""Loss, gradient norm and loss scale of a window of a foreign loop, read from the device once, before its update."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import Optimizer

from rawloop.watch.subject import Facts, Subject


@dataclass
class Scalars:
    """Collects what the numbers of a window are made of.

    Args:
        subject: the objects under watch.
        losses: roots of backward passes, and whether the scaler had multiplied them.
        clipped: the norm that `clip_grad_norm_` has returned, whether it was that of scaled gradients, and of all.
        skips_inside: whether a fused update is going to skip; None if none is fused.
    """

    subject: Subject
    losses: list[tuple[Tensor, bool]] = field(default_factory=list)
    clipped: Tensor | None = None
    clipped_scaled: bool = False
    clips_all: bool = False
    skips_inside: bool | None = None

    def clear(self) -> None:
        """Forget the window."""
        self.losses.clear()
        self.clipped = None

    def read(self, facts: Facts, probing: bool) -> tuple[float, float, float]:
        """Return (loss, norm of the gradients before clipping, loss scale); loss and norm are unscaled.

        The norm is that of `clip_grad_norm_`, if on all probing steps the same line has clipped all gradients.
        """
        found = {
            name: part for name, kind in (("scaled", True), ("loss", False)) if (part := self._sum(kind)) is not None
        }
        if self.clipped is not None:
            found["clipped"] = self.clipped
        if self.clipped is None or not self.clips_all or probing:
            found |= self._norms(facts)
        if isinstance(own := getattr(self.subject.scaler, "_scale", None), Tensor):
            found["scale"] = own
        for n, optimizer in enumerate(self.subject.optimizers):
            if isinstance(inf := getattr(optimizer, "found_inf", None), Tensor):  # of a fused one
                found[f"inf{n}"] = inf
        got = dict(zip(found, numbers([*found.values()]), strict=True))
        flags = [value for name, value in got.items() if name.startswith("inf")]
        self.skips_inside = any(flags) if flags else None
        scale = got["scale"] if "scale" in got else self.subject.loss_scale()
        loss = got.get("scaled", 0.0) / scale + got.get("loss", 0.0) if self.losses else math.nan
        before = got["clipped"] / (scale if self.clipped_scaled else 1.0) if "clipped" in got else math.inf
        if "norm" not in got:
            return loss, before, scale
        size = math.hypot(got["norm"] / (scale if facts.is_scaled else 1.0), got.get("late", 0.0) / scale)
        return loss, size if before <= size or "clipped" not in got else before, scale

    def _norms(self, facts: Facts) -> dict[str, Tensor]:
        """Return the norm of the gradients, apart for those that the scaler has not come to."""
        weights = [(w, grad) for _, w in self.subject.named() if (grad := w.grad) is not None]
        late = {id(w) for one in self.still_scaled(facts) for group in one.param_groups for w in group["params"]}
        if not late:
            return {"norm": total_norm([grad for _, grad in weights])}
        return {
            "norm": total_norm([grad for w, grad in weights if id(w) not in late]),
            "late": total_norm([grad for w, grad in weights if id(w) in late]),
        }

    def still_scaled(self, facts: Facts) -> list[Optimizer]:
        """Return the optimizers whose gradients are scaled, although the scaler has unscaled those of another one."""
        states = getattr(self.subject.scaler, "_per_optimizer_states", None)
        if not states or not facts.unscaled:
            return []
        done = {key for key, state in states.items() if getattr(state.get("stage"), "name", "READY") != "READY"}
        return [optimizer for optimizer in self.subject.optimizers if id(optimizer) not in done]

    def _sum(self, scaled: bool) -> Tensor | None:
        chosen = [loss.float().sum() if loss.dim() else loss for loss, kind in self.losses if kind is scaled]
        if len(chosen) < 2:
            return chosen[0] if chosen else None
        return torch.stack([loss.to(chosen[0].device, torch.float32) for loss in chosen]).sum()


def numbers(tensors: Sequence[Tensor]) -> list[float]:
    """Read tensors of one value: one by one from the host, else with one wait for the device."""
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return [*map(float, tensors)]
    device = next(tensor.device for tensor in tensors if tensor.device.type != "cpu")
    read: list[float] = torch.stack([t.detach().to(device, torch.float32).reshape(()) for t in tensors]).tolist()
    return read


def total_norm(grads: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of all gradients, in float32, as a tensor on the device of the first."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for grad in grads:
        grad = grad.coalesce().values() if grad.is_sparse else grad
        groups.setdefault((grad.device, grad.dtype), []).append(grad)
    if not groups:
        return torch.zeros(())
    norms: list[Tensor] = [
        torch.linalg.vector_norm(
            torch.stack(torch._foreach_norm(group, 2, dtype=torch.promote_types(d, torch.float32)))
        )
        for (_, d), group in groups.items()
    ]
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device, torch.float32) for norm in norms]))
    return total
