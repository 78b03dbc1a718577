"""The trained weights, and the float32 masters or stand-ins that take their place in an optimizer.

An update smaller than half a unit in the last place of a weight rounds to nothing: at a learning rate of 1e-5, 16-bit
weights lose more than half of all updates in FP16 and nearly all in bfloat16. Masters keep these updates, at 16 bytes
per weight with AdamW. Stochastic rounding keeps them in the mean, at 12.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rawloop.errors import CheckpointError, UserError
from rawloop.rounding import StochasticRounding
from rawloop.sharding import assign, parts_of, write_part

HALF = (torch.float16, torch.bfloat16)
ROUNDING = "StochasticRounding"  # the kind of a state without masters
BUCKET = 2**25  # numbers per call of the optimizer during such an update: 134 MB of float32 gradients


class TrainedWeights:
    """The trained weights in one dtype, and their masters or stand-ins.

    Args:
        named: the weights by name; they are cast in place.
        dtype: the dtype to cast them to.
        device: the device of the masters, where the model will be.
        masters: keep a float32 master of each weight that is cast to 16 bits.
        rounding: without masters, update bfloat16 weights in float32 and round them so.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        dtype: torch.dtype,
        device: torch.device,
        masters: bool = True,
        rounding: StochasticRounding | None = None,
    ) -> None:
        self.dtype = dtype
        self.weights = dict(named)
        self.masters: dict[str, nn.Parameter] = {}
        self.rounding = rounding if dtype == torch.bfloat16 and not masters else None
        for name, weight in self.weights.items():
            value = weight.detach()
            assign(weight, value.to(dtype))
            if masters and dtype in HALF:
                self.masters[name] = nn.Parameter(value.to(device, torch.float32, copy=True))
        rounded = self.weights if self.rounding else {}
        stand_ins = {name: self.rounding.stand_in(weight) for name, weight in rounded.items() if self.rounding}
        self._held = self.masters or stand_ins  # by the optimizer, in place of the weights
        self._name_of = {id(held): name for name, held in self._held.items()}
        self._known = {id(parameter) for _, parameter in self.named_parameters()}
        self._versions = self._counts()

    def _counts(self) -> list[int]:
        """Return how often others have written weights with masters in place. Writes through `.data` do not count."""
        return [self.weights[name]._version for name in self.masters]

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return the parameters that the optimizer must hold, under the names of the model's weights."""
        return [(name, self._held.get(name, weight)) for name, weight in self.weights.items()]

    def follow_weights(self) -> None:
        """Copy weights that others have written (DDP's broadcast, `load_state_dict`) into their masters.

        A master that still rounds to its weight is left alone, so it keeps all its digits.
        """
        if self._counts() == self._versions:
            return
        for name, master in self.masters.items():
            weight, value = self.weights[name].detach(), master.detach()
            value.copy_(torch.where(value.to(weight.dtype) != weight, weight.float(), value))
        self._versions = self._counts()

    def value(self, name: str) -> Tensor:
        """Return a weight in float32: its master if it has one."""
        return self.masters[name].detach() if name in self.masters else self.weights[name].detach().float()

    def weight_of(self, held: Tensor) -> Tensor:
        """Return the model's weight for a parameter of the optimizer. Backward puts the gradient on the weight."""
        name = self._name_of.get(id(held))
        return held if name is None else self.weights[name]

    def check(self, optimizers: Iterable[Optimizer]) -> list[nn.Parameter]:
        """Return the trained parameters that the optimizers hold.

        Raises:
            UserError: one is held twice, or was unfrozen or cast after the model was prepared.
        """
        self.check_casts()
        held = held_by(optimizers)
        ids = {*map(id, held)}
        if len(ids) < len(held):
            raise UserError("a weight is held by two optimizers, or twice by one, and would be updated twice: keep one")
        if ids <= self._known:  # as in nearly every step
            return held
        unfrozen = [tuple(p.shape) for p in held if p.requires_grad and id(p) not in self._known]
        if unfrozen:
            raise UserError(
                f"{len(unfrozen)} weights of the optimizer (first of shape {unfrozen[0]}) were unfrozen after "
                "policy.prepare(model): unfreeze before it"
            )
        return [p for p in held if id(p) in self._known]

    def check_casts(self) -> None:
        """Raise a UserError if a weight was cast after the model was prepared."""
        cast = next((name for name, weight in self.weights.items() if weight.dtype != self.dtype), None)
        if cast is not None:
            raise UserError(f"{cast} was cast after policy.prepare(model): cast before it, or leave it to the policy")

    def update(self, held: Sequence[nn.Parameter], factor: float, step: Callable[[], None]) -> None:
        """Multiply every gradient by `factor` in float32, step the optimizers, and round the result into the weights.

        In 16 bits, unscaling would flush small gradients to zero again. With masters or stand-ins, `step` is called
        once per `BUCKET` numbers while all other gradients are hidden, so few numbers are in float32 at a time.
        Optimizers that combine parameters beyond their group's settings do not work this way.
        """
        if not self._held:
            gradients = [p.grad for p in held if p.grad is not None]
            if gradients and factor != 1.0:
                torch._foreach_mul_(parts_of(gradients), factor)
            step()
            return
        for each in held:
            each.grad = None  # `unscale_gradients` may have set it
        for bucket in self._buckets(held):
            weights = [self.weight_of(each) for each in bucket]
            if self.rounding:
                self.rounding.fill(bucket)
            for each, gradient in zip(bucket, self._take_gradients(weights, factor), strict=True):
                each.grad = gradient
            step()
            for each in bucket:
                each.grad = None
            if self.rounding:
                self.rounding.write([(self._name_of[id(each)], each) for each in bucket])
            else:
                torch._foreach_copy_(parts_of(weight.data for weight in weights), parts_of(bucket))
        if self.rounding:
            self.rounding.updates += 1

    def _buckets(self, held: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
        """Yield what the optimizer holds for weights with a gradient, in groups of at most `BUCKET` numbers.

        The largest come last. By then the gradients of the others are gone.
        """
        bucket: list[nn.Parameter] = []
        size = 0
        with_gradient = [each for each in held if self.weight_of(each).grad is not None]
        for each in sorted(with_gradient, key=nn.Parameter.numel):
            if bucket and size + each.numel() > BUCKET:
                yield bucket
                bucket, size = [], 0
            bucket.append(each)
            size += each.numel()
        if bucket:
            yield bucket

    def unscale_gradients(self, held: Iterable[nn.Parameter], factor: float) -> None:
        """Multiply the gradients by `factor`, and set them on weights and on what the optimizer holds for them.

        With masters or stand-ins they are float32.
        """
        shown = [p for p in held if self.weight_of(p).grad is not None]
        weights = [self.weight_of(p) for p in shown]
        for parameter, weight, gradient in zip(shown, weights, self._take_gradients(weights, factor), strict=True):
            if self._held:
                weight.grad_dtype = None  # allows a float32 gradient on a 16-bit weight
            parameter.grad = weight.grad = gradient

    def _take_gradients(self, weights: Sequence[Tensor], factor: float) -> list[Tensor]:
        """Remove the gradients from weights, and return them times `factor`, in float32 if the update is."""
        given = [weight.grad for weight in weights if weight.grad is not None]
        gradients = given
        if self._held and any(gradient.dtype != torch.float32 for gradient in given):
            gradients = [torch.empty_like(gradient, dtype=torch.float32) for gradient in given]
            torch._foreach_copy_(parts_of(gradients), parts_of(given))
        if gradients and factor != 1.0:
            torch._foreach_mul_(parts_of(gradients), factor)
        for weight in weights:
            weight.grad = None
        return gradients

    def clear_gradients(self, held: Iterable[nn.Parameter] | None = None) -> None:
        """Drop the gradients of parameters that optimizers hold, and of their weights; by default all gradients."""
        for parameter in (p for _, p in self.named_parameters()) if held is None else held:
            parameter.grad = self.weight_of(parameter).grad = None

    def restore_float32(self) -> None:
        """Cast the model's weights back to their float32 values, in place. The masters are not used any more."""
        for name, weight in self.weights.items():
            weight.data = self.value(name).to(weight.device)

    def state_dict(self) -> dict[str, Any]:
        """Return the masters by name, or what random numbers depend on."""
        if self.rounding:
            return {"kind": ROUNDING, "kept": {}, "seed": self.rounding.seed, "updates": self.rounding.updates}
        return {"kind": "Masters", "kept": {name: master.detach() for name, master in self.masters.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the masters, or the place in the random numbers.

        Raises:
            CheckpointError: the masters belong to other weights, or the updates were rounded in another way.
        """
        stored = state["kept"]
        if not stored and not self.masters and bool(self.rounding) != (state["kind"] == ROUNDING):
            then = ("not ", "")[state["kind"] == ROUNDING]
            raise CheckpointError(
                f"the checkpoint's updates were {then}rounded stochastically, and its optimizer state is of that kind: "
                "set precision.masters and precision.trainable_dtype to what it was trained with, or start another run "
                "from its weights with --init_from CHECKPOINT --output NEW"
            )
        different = sorted(set(stored) ^ set(self.masters))
        if different or (stored and state["kind"] != "Masters"):
            names = f" ({len(different)} differ, first {different[0]})" if different else ""
            kind = state["kind"].lower()
            again = "set precision.masters and precision.trainable_dtype to what it was trained with, or "
            again = "" if kind == "residuals" else again  # no setting gives these any more
            raise CheckpointError(
                f"the checkpoint has {len(stored)} {kind}, and this model {len(self.masters)} masters{names}: {again}"
                "start another run from its weights with --init_from CHECKPOINT --output NEW"
            )
        if self.rounding:
            self.rounding.seed, self.rounding.updates = state["seed"], state["updates"]
        for name, master in self.masters.items():
            write_part(master, stored[name])
        self._versions = self._counts()


def held_by(optimizers: Iterable[Optimizer]) -> list[nn.Parameter]:
    """Return all parameters that optimizers hold, in order."""
    return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
