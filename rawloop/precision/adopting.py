"""Puts masters, or stand-ins, into an optimizer in place of the model's weights, and moves its state along."""

from collections.abc import Iterable, Mapping
from inspect import Parameter, signature
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from rawloop.errors import UserError
from rawloop.precision.masters import HALF, TrainedWeights, held_by


def adopt(optimizer: Optimizer, trained: TrainedWeights, frozen: Iterable[nn.Parameter] = ()) -> None:
    """Replace the model's weights in an optimizer by their masters or stand-ins.

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
