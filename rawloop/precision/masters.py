"""What an optimizer holds in place of 16-bit weights, so that no update is lost to their rounding.

An update below half a unit in the last place of a weight rounds to nothing: at a learning rate of 1e-5 more than half
of all updates of FP16 weights are lost, and nearly all of bfloat16 weights. Float32 masters keep them, at 16 bytes per
weight with AdamW; a 16-bit residual keeps nearly all of them, at 14 bytes.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rawloop.errors import CheckpointError

HALF = (torch.float16, torch.bfloat16)
BUCKET = 2**25  # numbers that are in float32 at a time during an update: 268 MB of gradients and masters
# What rounding to FP16 takes away is at most 16 (half a unit at 65504): times 2048 it still fits, and the small ones,
# which would be subnormal or zero, become normal. bfloat16 has float32's range and needs no factor.
RESIDUAL_SCALE = {torch.float16: 2048.0, torch.bfloat16: 1.0}


class Trained:
    """The trained weights, cast to their dtype, and what an optimizer holds in their place: here they themselves.

    Args:
        named: the weights, by name; in 16 bits they are rounded now.
        dtype: what they shall be of.
        device: where the model will be.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.weights = dict(named)
        self.stand_ins: dict[str, nn.Parameter] = {}
        for name, weight in self.weights.items():
            value = weight.detach()
            weight.data = value.to(dtype)
            if dtype in HALF:
                self._keep(name, value)
        self._name_of = {id(stand_in): name for name, stand_in in self.stand_ins.items()}
        self._versions = self._counts()

    def _counts(self) -> list[int]:
        """How often each weight with a stand-in was written in place; our own writes go through `.data`, uncounted."""
        return [self.weights[name]._version for name in self.stand_ins]

    def _keep(self, name: str, value: Tensor) -> None:
        """Keep what the weight has lost of `value`; here nothing is kept."""

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """What an optimizer must hold, by the names of the model's weights."""
        return [(name, self.stand_ins.get(name, weight)) for name, weight in self.weights.items()]

    def written(self) -> bool:
        """Whether somebody has written into weights since `follow_weights`: DDP's broadcast, `load_state_dict`."""
        return self._counts() != self._versions

    def follow_weights(self) -> None:
        """Take over what was written into weights by others; what is kept of all other numbers stays as it is."""
        for name in self.stand_ins:
            weight = self.weights[name].detach()
            self._follow(name, self.value(name).to(weight.dtype) != weight)
        self._versions = self._counts()

    def _follow(self, name: str, changed: Tensor) -> None:
        """Take over the weight where it no longer is what is kept, rounded; here nothing is kept."""

    def value(self, name: str) -> Tensor:
        """The weight with all that is kept of it, in float32."""
        return self.weights[name].detach().float()

    def gradient(self, held: Tensor) -> Tensor | None:
        """The gradient of a parameter that an optimizer holds, where backward has put it: on the model's weight."""
        name = self._name_of.get(id(held))
        return held.grad if name is None else self.weights[name].grad

    def update(self, held: Iterable[nn.Parameter], factor: float, step: Callable[[], None]) -> None:
        """Step the optimizers, with every gradient times `factor` in float32, and round the result into the weights.

        Unscaling in 16 bits would flush to zero what loss scaling has just saved. Where weights have stand-ins,
        `step` is called once for every `BUCKET` numbers, with all other gradients hidden, so that little is in float32
        at a time: optimizers whose parameters influence each other beyond their group's settings do not fit.
        """
        if not self.stand_ins:
            gradients = [p.grad for p in held if p.grad is not None]
            if gradients and factor != 1.0:
                torch._foreach_mul_(gradients, factor)
            step()
        for bucket in self._buckets(held):
            for name in bucket:
                self._hand_over(name, factor)
            step()
            for name in bucket:
                self._take_back(name)

    def _buckets(self, held: Iterable[nn.Parameter]) -> Iterator[list[str]]:
        """The stand-ins whose weights have a gradient, some at a time, by name."""
        names = [self._name_of[id(p)] for p in held if id(p) in self._name_of]
        bucket: list[str] = []
        size = 0
        for name in (name for name in names if self.weights[name].grad is not None):
            if bucket and size + self.weights[name].numel() > BUCKET:
                yield bucket
                bucket, size = [], 0
            bucket.append(name)
            size += self.weights[name].numel()
        if bucket:
            yield bucket

    def _hand_over(self, name: str, factor: float) -> None:
        weight = self.weights[name]
        assert weight.grad is not None
        self.stand_ins[name].grad = weight.grad.float().mul_(factor)
        weight.grad = None

    def _take_back(self, name: str) -> None:
        stand_in = self.stand_ins[name]
        stand_in.grad = None
        self.weights[name].data.copy_(stand_in.detach())

    def clear_gradients(self) -> None:
        """Drop the gradients that no optimizer sees: those of weights with a stand-in."""
        for name in self.stand_ins:
            self.weights[name].grad = None

    def restore_float32(self) -> None:
        """Give the model's weights their whole value, in float32, in place; the stand-ins are of no use afterwards."""
        for name, weight in self.weights.items():
            weight.data = self.value(name)

    def kept(self) -> dict[str, Tensor]:
        """What is kept beside the weights, by name."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return what is kept beside the weights, and of what kind it is."""
        return {"kind": type(self).__name__, "kept": self.kept()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what is kept; made anew from the rounded weights it would lose what it is there for.

        Raises:
            CheckpointError: it is of another kind or of other weights.
        """
        own, stored = self.kept(), state["kept"]
        if set(own) != set(stored) or (own and state["kind"] != type(self).__name__):
            different = sorted(set(stored) ^ set(own))
            names = f": {len(different)} differ, first {different[0]}" if different else ""
            raise CheckpointError(
                f"the checkpoint's {state['kind'].lower()} do not fit this model's {type(self).__name__.lower()}{names}"
                "; set precision.masters and precision.trainable_dtype to what it was trained with, or start another "
                "run from these weights with --init_from CHECKPOINT --output NEW"
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(stored[name])
        self._versions = self._counts()


class Masters(Trained):
    """Trained weights in 16 bits with a float32 master each: the optimizer holds the masters."""

    def _keep(self, name: str, value: Tensor) -> None:
        self.stand_ins[name] = nn.Parameter(value.to(self.device, torch.float32, copy=True))

    def value(self, name: str) -> Tensor:
        """The master of a 16-bit weight."""
        return self.stand_ins[name].detach() if name in self.stand_ins else super().value(name)

    def _follow(self, name: str, changed: Tensor) -> None:
        master = self.stand_ins[name].detach()
        master.copy_(torch.where(changed, self.weights[name].detach().float(), master))

    def kept(self) -> dict[str, Tensor]:
        """The masters."""
        return {name: master.detach() for name, master in self.stand_ins.items()}


class Residuals(Trained):
    """Trained weights in 16 bits with what rounding took from them, in 16 bits more.

    The optimizer holds float32 parameters without memory of their own, which are filled for the time of an update.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], dtype: torch.dtype, device: torch.device) -> None:
        self.rests: dict[str, Tensor] = {}
        super().__init__(named, dtype, device)

    def _keep(self, name: str, value: Tensor) -> None:
        weight = self.weights[name]
        self.rests[name] = torch.empty_like(weight, device=self.device)
        self.stand_ins[name] = nn.Parameter(self._empty(weight))
        self._split(name, value)

    def _empty(self, weight: Tensor) -> Tensor:
        """A float32 tensor of the weight's shape that takes four bytes in all."""
        return torch.zeros((), device=self.device).expand(weight.shape)

    def _split(self, name: str, value: Tensor) -> None:
        weight = self.weights[name].data
        weight.copy_(value)
        self.rests[name].copy_((value.to(weight.device) - weight.float()).mul_(RESIDUAL_SCALE[self.dtype]))

    def value(self, name: str) -> Tensor:
        """Weight and residual together, in float32."""
        if name not in self.rests:
            return super().value(name)
        weight = self.weights[name].detach().float()
        return weight.add_(self.rests[name].float().div_(RESIDUAL_SCALE[self.dtype]))

    def _follow(self, name: str, changed: Tensor) -> None:
        self.rests[name].masked_fill_(changed, 0.0)

    def _hand_over(self, name: str, factor: float) -> None:
        self.stand_ins[name].data = self.value(name)
        super()._hand_over(name, factor)

    def _take_back(self, name: str) -> None:
        stand_in = self.stand_ins[name]
        stand_in.grad = None
        self._split(name, stand_in.detach())
        stand_in.data = self._empty(stand_in)

    def kept(self) -> dict[str, Tensor]:
        """The residuals."""
        return self.rests


KINDS = {"fp32": Masters, "residual": Residuals, "none": Trained}


def unit_in_last_place(weight: Tensor) -> Tensor:
    """The distance from each number to the next larger one of its dtype, float32."""
    info = torch.finfo(weight.dtype)
    _, exponent = torch.frexp(weight.detach().float())  # |w| = m x 2^exponent with m in [0.5, 1)
    power = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent - 1)
    power = torch.where(weight == 0, info.smallest_normal, power.clamp(min=info.smallest_normal))
    return power * info.eps


def share_of_lost_updates(weights: Iterable[Tensor], lr: float) -> float:
    """The share of weights that an update of size `lr`, Adam's usual one, would leave as they are.

    An update below half a unit in the last place rounds to nothing.
    """
    lost = total = 0
    for weight in weights:
        lost += int((unit_in_last_place(weight) / 2 > lr).sum())
        total += weight.numel()
    return lost / total if total else 0.0
