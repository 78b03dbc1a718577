"""The trained weights, and the float32 masters that take their place in an optimizer.

An update smaller than half a unit in the last place of a weight rounds to nothing: at a learning rate of 1e-5, 16-bit
weights lose more than half of all updates in FP16 and nearly all in bfloat16. Masters keep these updates, at 16 bytes
per weight with AdamW.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rawloop.errors import CheckpointError, UserError
from rawloop.sharding import parts_of, sharded_as, write_part

HALF = (torch.float16, torch.bfloat16)
BUCKET = 2**25  # numbers per call of the optimizer during an update with masters: 134 MB of float32 gradients


class TrainedWeights:
    """The trained weights in one dtype, and their masters.

    Args:
        named: the weights by name; they are cast in place.
        dtype: the dtype to cast them to.
        device: the device of the masters, where the model will be.
        masters: keep a float32 master of each weight that is cast to 16 bits.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        dtype: torch.dtype,
        device: torch.device,
        masters: bool = True,
    ) -> None:
        self.dtype = dtype
        self.weights = dict(named)
        self.masters: dict[str, nn.Parameter] = {}
        for name, weight in self.weights.items():
            value = weight.detach()
            weight.data = value.to(dtype)
            if masters and dtype in HALF:
                self.masters[name] = nn.Parameter(value.to(device, torch.float32, copy=True))
        self._index()

    def take_shards(self, named: Mapping[str, nn.Parameter]) -> None:
        """Take the sharded weights in place of the whole ones, by name, and shard the masters."""
        self.weights = {name: named[name] for name in self.weights}
        for name, master in self.masters.items():
            self.masters[name] = nn.Parameter(sharded_as(master.detach(), self.weights[name]))
        self._index()

    def _index(self) -> None:
        self._name_of = {id(master): name for name, master in self.masters.items()}
        self._known = {id(parameter) for _, parameter in self.named_parameters()}
        self._versions = self._counts()

    def _counts(self) -> list[int]:
        """Return how often others have written weights with masters in place. Writes through `.data` do not count."""
        return [self.weights[name]._version for name in self.masters]

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return the parameters that the optimizer must hold, under the names of the model's weights."""
        return [(name, self.masters.get(name, weight)) for name, weight in self.weights.items()]

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
        """Multiply every gradient by `factor` in float32, step the optimizers, and round the masters into the weights.

        In 16 bits, unscaling would flush small gradients to zero again. With masters, `step` is called once per
        `BUCKET` numbers while all other gradients are hidden, so few gradients are in float32 at a time. Optimizers
        that combine parameters beyond their group's settings do not work this way.
        """
        if not self.masters:
            gradients = [p.grad for p in held if p.grad is not None]
            if gradients and factor != 1.0:
                torch._foreach_mul_(parts_of(gradients), factor)
            step()
            return
        for master in held:
            master.grad = None  # `unscale_gradients` may have set it
        for masters in self._buckets(held):
            weights = [self.weight_of(master) for master in masters]
            for master, gradient in zip(masters, self._take_gradients(weights, factor), strict=True):
                master.grad = gradient
            step()
            for master in masters:
                master.grad = None
            torch._foreach_copy_(parts_of(weight.data for weight in weights), parts_of(masters))

    def _buckets(self, held: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
        """Yield the masters of weights with a gradient, in groups of at most `BUCKET` numbers."""
        bucket: list[nn.Parameter] = []
        size = 0
        for master in (master for master in held if self.weight_of(master).grad is not None):
            if bucket and size + master.numel() > BUCKET:
                yield bucket
                bucket, size = [], 0
            bucket.append(master)
            size += master.numel()
        if bucket:
            yield bucket

    def unscale_gradients(self, held: Iterable[nn.Parameter], factor: float) -> None:
        """Multiply the gradients by `factor`, and set them on weights and masters alike; with masters in float32."""
        shown = [p for p in held if self.weight_of(p).grad is not None]
        weights = [self.weight_of(p) for p in shown]
        for parameter, weight, gradient in zip(shown, weights, self._take_gradients(weights, factor), strict=True):
            if self.masters:
                weight.grad_dtype = None  # allows a float32 gradient on a 16-bit weight
            parameter.grad = weight.grad = gradient

    def _take_gradients(self, weights: Sequence[Tensor], factor: float) -> list[Tensor]:
        """Remove the gradients from weights, and return them times `factor`; with masters in float32."""
        given = [weight.grad for weight in weights if weight.grad is not None]
        gradients = given
        if self.masters and any(gradient.dtype != torch.float32 for gradient in given):
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
        """Return the masters by name."""
        return {"kind": "Masters", "kept": {name: master.detach() for name, master in self.masters.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the masters.

        Raises:
            CheckpointError: they belong to other weights.
        """
        stored = state["kept"]
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
        for name, master in self.masters.items():
            write_part(master, stored[name])
        self._versions = self._counts()


def held_by(optimizers: Iterable[Optimizer]) -> list[nn.Parameter]:
    """Return all parameters that optimizers hold, in order."""
    return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]


def adopt(optimizer: Optimizer, trained: TrainedWeights, frozen: Iterable[nn.Parameter] = ()) -> None:
    """Replace the model's weights in an optimizer by their masters.

    Args:
        optimizer: changed in place.
        trained: the model's trained weights.
        frozen: the model's other weights. An optimizer may hold these too: without a gradient they do not change.

    Raises:
        UserError: the optimizer holds weights of another model, needs a closure to step, averages weights in 16 bits,
            or wraps another optimizer; a weight was cast since the model was prepared, or optimizer state was loaded
            in 16 bits.
    """
    trained.check_casts()
    closure = signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is Parameter.empty:
        raise UserError(
            f"{type(optimizer).__name__} runs the forward pass itself, in a closure: gradients of several passes "
            "cannot be unscaled and tested as one step; use an optimizer that steps without one"
        )
    check_averaging(optimizer, trained)
    held = dict(trained.named_parameters())
    stand_ins = {id(weight): held[name] for name, weight in trained.weights.items()}
    known = {id(parameter) for parameter in (*held.values(), *frozen)} | set(stand_ins)
    holds = held_by([optimizer])
    unknown = [tuple(p.shape) for p in holds if id(p) not in known]
    if unknown:
        raise UserError(
            f"the optimizer holds {len(holds)} weights, {len(unknown)} of which (first of shape {unknown[0]}) are not "
            f"among the {len(held)} that the prepared model trains: build it after policy.prepare, over "
            "policy.named_parameters()"
        )
    replace_parameters(optimizer, stand_ins, loaded=True)


def check_averaging(optimizer: Optimizer, trained: TrainedWeights) -> None:
    """Raise UserError if an optimizer averages weights, as schedule-free ones do, and these are in 16 bits."""
    if trained.dtype in HALF and hasattr(optimizer, "train") and hasattr(optimizer, "eval"):
        raise UserError(
            f"{type(optimizer).__name__} averages the weights that it holds, and the trained weights are "
            f"{trained.dtype}: an average in 16 bits is lost to rounding, and one of masters is not in the model; "
            "train float32 weights (precision.mode bf16 or amp_fp16, precision.trainable_dtype auto), or take adamw"
        )


def replace_parameters(optimizer: Optimizer, replacements: Mapping[int, nn.Parameter], loaded: bool = False) -> None:
    """Replace the parameters that an optimizer holds, by id, and move their state along.

    Groups, learning rates, hooks and schedulers stay, so references to the optimizer remain valid.

    Args:
        optimizer: changed in place.
        replacements: id of a parameter -> the parameter that takes its place.
        loaded: the state, if any, was loaded, perhaps in 16 bits.

    Raises:
        UserError: the loaded state of a replaced parameter is in 16 bits, so its digits are lost. Or the optimizer
            wraps another one, which would go on updating the old parameters.
    """
    replaced = [p for p in held_by([optimizer]) if replacements.get(id(p), p) is not p]
    inner = [
        name
        for name, value in vars(optimizer).items()
        if isinstance(value, Optimizer) and value.param_groups is not optimizer.param_groups
    ]
    if inner and replaced:
        raise UserError(
            f"{type(optimizer).__name__} holds its parameters in another optimizer (.{inner[0]}), where they cannot be "
            "replaced by float32 masters, so that nothing would be trained: use a plain optimizer, or a mode with "
            "float32 trainables (bf16, amp_fp16)"
        )
    states = [value for p in replaced if loaded and p in optimizer.state for value in optimizer.state[p].values()]
    if any(map(_is_half, states)):
        raise UserError(
            "the optimizer's state is in 16 bits, in which most of it is zero: torch casts a loaded state to the "
            "weights' dtype. Call policy.adopt(optimizer) before optimizer.load_state_dict(...)"
        )
    for group in optimizer.param_groups:
        for place, old in enumerate(group["params"]):
            group["params"][place] = new = replacements.get(id(old), old)
            if old not in optimizer.state or (new is old and old.dtype in HALF):
                continue
            # A weight that stays may have become float32, and its state has to follow.
            state = optimizer.state.pop(old)
            optimizer.state[new] = {k: value.float() if _is_half(value) else value for k, value in state.items()}


def _is_half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in HALF
