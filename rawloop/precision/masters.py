"""The trained weights, and the float32 masters that an optimizer updates in place of 16-bit weights.

An update below half a unit in the last place of a weight rounds to nothing: at a learning rate of 1e-5, 16-bit weights
lose more than half of all updates in FP16 and nearly all in bfloat16. Masters keep them, at 16 bytes per weight with
AdamW.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rawloop.errors import CheckpointError, UserError

HALF = (torch.float16, torch.bfloat16)
BUCKET = 2**25  # numbers whose gradients are in float32 at a time during an update: 134 MB


class TrainedWeights:
    """The trained weights in one dtype, and their masters.

    Args:
        named: the weights, by name; they are cast now.
        dtype: what they are cast to.
        device: where the model will be.
        masters: keep a float32 master of each weight that is cast to 16 bits.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        dtype: torch.dtype,
        device: torch.device,
        masters: bool = True,
    ) -> None:
        self.dtype, self.device = dtype, device
        self.weights = dict(named)
        self.masters: dict[str, nn.Parameter] = {}
        for name, weight in self.weights.items():
            value = weight.detach()
            weight.data = value.to(dtype)
            if masters and dtype in HALF:
                self.masters[name] = nn.Parameter(value.to(device, torch.float32, copy=True))
        self._name_of = {id(master): name for name, master in self.masters.items()}
        self._known = {id(parameter) for _, parameter in self.named_parameters()}
        self._versions = self._counts()

    def _counts(self) -> list[int]:
        """How often each weight with a master was written in place; our own writes go through `.data`, uncounted."""
        return [self.weights[name]._version for name in self.masters]

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that an optimizer must hold, by the names of the model's weights."""
        return [(name, self.masters.get(name, weight)) for name, weight in self.weights.items()]

    def follow_weights(self) -> None:
        """Take over what others have written into weights (DDP's broadcast, `load_state_dict`).

        A master whose weight nobody wrote to keeps all its digits.
        """
        if self._counts() == self._versions:
            return
        for name, master in self.masters.items():
            weight, value = self.weights[name].detach(), master.detach()
            value.copy_(torch.where(value.to(weight.dtype) != weight, weight.float(), value))
        self._versions = self._counts()

    def value(self, name: str) -> Tensor:
        """A weight's float32 value: its master if it has one."""
        return self.masters[name].detach() if name in self.masters else self.weights[name].detach().float()

    def weight_of(self, held: Tensor) -> Tensor:
        """The model's weight for a parameter that an optimizer holds: backward puts the gradient there."""
        name = self._name_of.get(id(held))
        return held if name is None else self.weights[name]

    def check(self, optimizers: Iterable[Optimizer]) -> list[nn.Parameter]:
        """Return the trained parameters that optimizers hold.

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
        """Refuse weights that were cast after the model was prepared.

        Raises:
            UserError: naming the first.
        """
        cast = next((name for name, weight in self.weights.items() if weight.dtype != self.dtype), None)
        if cast is not None:
            raise UserError(f"{cast} was cast after policy.prepare(model): cast before it, or leave it to the policy")

    def update(self, held: Sequence[nn.Parameter], factor: float, step: Callable[[], None]) -> None:
        """Step the optimizers with every gradient times `factor`, multiplied in float32, and round into the weights.

        Unscaling in 16 bits would flush to zero what loss scaling has just saved. With masters, `step` is called once
        for every `BUCKET` numbers, with all other gradients hidden, so that few gradients are in float32 at a time:
        optimizers whose parameters influence each other beyond their group's settings do not fit.
        """
        if not self.masters:
            gradients = [p.grad for p in held if p.grad is not None]
            if gradients and factor != 1.0:
                torch._foreach_mul_(gradients, factor)
            step()
            return
        for master in held:
            master.grad = None  # `show_gradients` may have set it
        for masters in self._buckets(held):
            weights = [self.weight_of(master) for master in masters]
            for master, gradient in zip(masters, _in_float32(weights, factor), strict=True):
                master.grad = gradient
            step()
            for master in masters:
                master.grad = None
            torch._foreach_copy_([weight.data for weight in weights], [master.detach() for master in masters])

    def _buckets(self, held: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
        """The masters whose weights have a gradient, some at a time."""
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

    def show_gradients(self, held: Iterable[nn.Parameter], factor: float) -> None:
        """Multiply gradients by `factor` in float32, and show them on weights and masters alike."""
        shown = [p for p in held if self.weight_of(p).grad is not None]
        weights = [self.weight_of(p) for p in shown]
        gradients = _in_float32(weights, factor) if self.masters else [w.grad for w in weights if w.grad is not None]
        if not self.masters and gradients and factor != 1.0:
            torch._foreach_mul_(gradients, factor)
        for parameter, weight, gradient in zip(shown, weights, gradients, strict=True):
            if self.masters:
                weight.grad_dtype = None  # torch takes a float32 gradient of a 16-bit weight only if told so
            parameter.grad = weight.grad = gradient

    def clear_gradients(self, held: Iterable[nn.Parameter] | None = None) -> None:
        """Drop the gradients of parameters that optimizers hold, and of their weights; by default of all."""
        for parameter in (p for _, p in self.named_parameters()) if held is None else held:
            parameter.grad = self.weight_of(parameter).grad = None

    def restore_float32(self) -> None:
        """Give the model's weights their float32 value, in place; the masters are of no use afterwards."""
        for name, weight in self.weights.items():
            weight.data = self.value(name)

    def state_dict(self) -> dict[str, Any]:
        """Return the masters, by name."""
        return {"kind": "Masters", "kept": {name: master.detach() for name, master in self.masters.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the masters; made anew from rounded weights they would lose the digits that they are there for.

        Raises:
            CheckpointError: they are of other weights.
        """
        stored = state["kept"]
        different = sorted(set(stored) ^ set(self.masters))
        if different or (stored and state["kind"] != "Masters"):
            names = f" ({len(different)} differ, first {different[0]})" if different else ""
            raise CheckpointError(
                f"the checkpoint has {len(stored)} {state['kind'].lower()}, and this model {len(self.masters)} masters"
                f"{names}: set precision.masters and precision.trainable_dtype to what it was trained with, or start "
                "another run from its weights with --init_from CHECKPOINT --output NEW"
            )
        for name, master in self.masters.items():
            master.detach().copy_(stored[name])
        self._versions = self._counts()


def _in_float32(weights: Sequence[Tensor], factor: float) -> list[Tensor]:
    """Take the gradients off weights, in float32 and times `factor`."""
    given = [weight.grad for weight in weights if weight.grad is not None]
    gradients = given
    if any(gradient.dtype != torch.float32 for gradient in given):
        gradients = [torch.empty_like(gradient, dtype=torch.float32) for gradient in given]
        torch._foreach_copy_(gradients, given)
    if gradients and factor != 1.0:
        torch._foreach_mul_(gradients, factor)
    for weight in weights:
        weight.grad = None
    return gradients


def held_by(optimizers: Iterable[Optimizer]) -> list[nn.Parameter]:
    """All parameters that optimizers hold, in order."""
    return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]


def adopt(optimizer: Optimizer, trained: TrainedWeights, frozen: Iterable[nn.Parameter] = ()) -> None:
    """Let an optimizer that was built over the model's own weights hold what stands for them.

    Args:
        optimizer: changed in place.
        trained: the model's trained weights.
        frozen: the model's other weights, which an optimizer may hold as well: without a gradient they stay.

    Raises:
        UserError: it holds weights that are not the model's, steps only with a closure, or holds its parameters
            elsewhere too; a weight was cast since the model was prepared, or a state has been loaded in 16 bits.
    """
    trained.check_casts()
    closure = signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is Parameter.empty:
        raise UserError(
            f"{type(optimizer).__name__} runs the forward pass itself, in a closure: gradients of several passes "
            "cannot be unscaled and tested as one step; use an optimizer that steps without one"
        )
    held = dict(trained.named_parameters())
    stand_ins = {id(weight): held[name] for name, weight in trained.weights.items()}
    known = {id(parameter) for parameter in (*held.values(), *frozen)} | set(stand_ins)
    holds = held_by([optimizer])
    strange = [tuple(p.shape) for p in holds if id(p) not in known]
    if strange:
        raise UserError(
            f"the optimizer holds {len(holds)} weights, {len(strange)} of which (first of shape {strange[0]}) are not "
            f"among the {len(held)} that the prepared model trains: build it after policy.prepare, over "
            "policy.named_parameters()"
        )
    exchange(optimizer, stand_ins, loaded=True)


def exchange(optimizer: Optimizer, replacements: Mapping[int, nn.Parameter], loaded: bool = False) -> None:
    """Replace the parameters that an optimizer holds, by identity, and move their running means along.

    Groups, learning rates, hooks and schedulers stay as they are, so that nothing that points at the optimizer has to
    be built anew.

    Args:
        optimizer: changed in place.
        replacements: identity of a parameter -> what to hold in its place.
        loaded: whatever state there is has been loaded, perhaps into 16 bits.

    Raises:
        UserError: a loaded state is in 16 bits and would have to be in 32: what is lost cannot be got back. Or the
            optimizer only passes its parameters on, and would go on stepping the old ones.
    """
    inner = [
        name
        for name, value in vars(optimizer).items()
        if isinstance(value, Optimizer) and value.param_groups is not optimizer.param_groups
    ]
    if inner and any(replacements.get(id(p), p) is not p for p in held_by([optimizer])):
        raise UserError(
            f"{type(optimizer).__name__} holds its parameters in another optimizer (.{inner[0]}), where they cannot be "
            "replaced by float32 masters, so that nothing would be trained: use a plain optimizer, or a mode with "
            "float32 trainables (bf16, amp_fp16)"
        )
    if loaded:  # before anything is changed
        replaced = [p for p in held_by([optimizer]) if replacements.get(id(p), p) is not p and p in optimizer.state]
        _refuse_16_bits(value for p in replaced for value in optimizer.state[p].values())
    for group in optimizer.param_groups:
        for place, old in enumerate(group["params"]):
            group["params"][place] = replacement = replacements.get(id(old), old)
            if old not in optimizer.state or (replacement is old and old.dtype in HALF):
                continue
            state = optimizer.state.pop(old)
            # the same weight may have become float32 as well, under its running means
            optimizer.state[replacement] = {key: _as_float32(value) for key, value in state.items()}


def _refuse_16_bits(values: Iterable[Any]) -> None:
    if any(isinstance(value, Tensor) and value.dtype in HALF for value in values):
        raise UserError(
            "the optimizer's state is in 16 bits, in which most of it is zero: torch casts a loaded state to the "
            "weights' dtype. Call policy.adopt(optimizer) before optimizer.load_state_dict(...)"
        )


def _as_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value
