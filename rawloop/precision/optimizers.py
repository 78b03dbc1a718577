"""Putting other parameters, such as masters, into an optimizer that somebody else has built."""

from collections.abc import Iterable, Mapping
from inspect import Parameter, signature
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from rawloop.errors import UserError
from rawloop.precision.masters import HALF, TrainedWeights, held_by


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
