"""What the policy does to an optimizer that it did not build: put other parameters into it, and clean up after a
failure.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from rawloop.errors import UserError
from rawloop.precision.masters import HALF


def exchange(optimizer: Optimizer, replacements: Mapping[int, nn.Parameter], loaded: bool = False) -> None:
    """Replace the parameters that an optimizer holds, by identity, and move their running means along.

    Groups, learning rates, hooks and schedulers stay as they are, so that nothing that points at the optimizer has to
    be built anew.

    Args:
        optimizer: changed in place.
        replacements: identity of a parameter -> what to hold in its place.
        loaded: whatever state there is has been loaded, perhaps into 16 bits.

    Raises:
        UserError: a loaded state is in 16 bits and would have to be in 32: what is lost cannot be got back.
    """
    for group in optimizer.param_groups:
        for place, old in enumerate(group["params"]):
            replacement = replacements.get(id(old), old)
            if replacement is old:
                continue
            if old in optimizer.state:
                state = optimizer.state[old]
                if loaded:
                    _refuse_16_bits(state.values())
                optimizer.state[replacement] = {key: _as_float32(value) for key, value in state.items()}
                del optimizer.state[old]
            group["params"][place] = replacement


def _refuse_16_bits(values: Iterable[Any]) -> None:
    if any(isinstance(value, Tensor) and value.dtype in HALF for value in values):
        raise UserError(
            "the optimizer's state is in 16 bits, in which most of it is zero: torch casts a loaded state to the "
            "weights' dtype. Call policy.adopt(optimizer) before optimizer.load_state_dict(...)"
        )


def _as_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value


def clear(optimizers: Iterable[Optimizer]) -> None:
    """Drop all gradients, and what a scaler may have left on a fused optimizer after a failed step.

    A stale `found_inf` of 1 would make every later step of the optimizer a silent no-op.
    """
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
        for name in ("grad_scale", "found_inf"):
            optimizer.__dict__.pop(name, None)
