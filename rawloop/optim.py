"""AdamW, the learning-rate schedule as a pure function of the step, and optimizer state keyed by parameter name."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from rawloop.errors import CheckpointError, UserError


@dataclass
class OptimConfig:
    """AdamW and its schedule.

    Args:
        lr: peak learning rate.
        weight_decay: decoupled weight decay of matrices; vectors (norms, biases) get none.
        beta1: decay of the gradient's running mean.
        beta2: decay of the squared gradient's running mean.
        eps: added to the root of the running mean square.
        schedule: after warm-up: constant, linear to 0, or cosine to 0.
        warmup_steps: steps over which the learning rate rises linearly from 0 to lr.
        max_norm: clip the global gradient norm to this; 0 clips nothing.
    """

    lr: float = 1e-4
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = 0
    max_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("lr", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"optim.{name} is {getattr(self, name)}: it must be a number above 0")
        for name in ("warmup_steps", "max_norm", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"optim.{name} is {getattr(self, name)}: it must be a number, and not below 0")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optim.{name} is {getattr(self, name)}: it must be at least 0 and below 1")


def build_optimizer(named: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> AdamW:
    """Return fused AdamW over trainable parameters.

    Args:
        named: what is to be held, by name: `PrecisionPolicy.named_parameters()`, or a model's. Build it last.
        config: rates and decay.
    """
    trainable = [parameter for _, parameter in named if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = all(p.device.type in ("cpu", "cuda", "mps") for p in trainable)
    return AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=fused)


def lr_at(step: int, total: int, config: OptimConfig) -> float:
    """Learning rate of the update that leads from `step` to `step + 1`, of `total` updates.

    Warm-up is linear and reaches `lr` at its last step. The decay runs over the remaining steps and would reach 0 one
    step after the last.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    progress = min(1.0, progress)
    if config.schedule == "linear":
        return config.lr * (1.0 - progress)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * progress))


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


class NamedOptimizerState:
    """An optimizer's state for checkpoints, keyed by parameter name instead of by position.

    Positions shift when a parameter is frozen or added; names say what is missing.
    """

    def __init__(
        self, optimizer: Optimizer, named: Callable[[], Iterable[tuple[str, nn.Parameter]]], cast: bool = False
    ) -> None:
        """`named` tells what the optimizer holds, by name, whenever it is asked: a fallback may have changed it.

        `cast` says that running means are to take the dtype that the parameters have today.

        Raises:
            UserError: `optimizer` is none, or `named` cannot be called, as what `named_parameters()` returns cannot.
        """
        if not isinstance(optimizer, Optimizer) or not callable(named):
            raise UserError(
                f"NamedOptimizerState takes an optimizer and what can be called for its parameters, such as "
                f"model.named_parameters without parentheses: it got {type(optimizer).__name__} and "
                f"{type(named).__name__}"
            )
        self.optimizer, self.named, self.cast = optimizer, named, cast

    @property
    def names(self) -> dict[str, nn.Parameter]:
        """The trained parameters that the optimizer holds now."""
        return {name: parameter for name, parameter in self.named() if parameter.requires_grad}

    def state_dict(self) -> dict[str, Any]:
        """Return `{name: state of that parameter}`; a parameter that was never updated has an empty one.

        Raises:
            UserError: the optimizer holds trained parameters that have no name, whose state would be lost.
        """
        state, names = self.optimizer.state, self.names
        known = {id(parameter) for parameter in names.values()}
        held = [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]
        nameless = sum(id(parameter) not in known for parameter in held)
        if nameless:
            raise UserError(
                f"{nameless} of the {len(held)} parameters that the optimizer trains are not among those that "
                "NamedOptimizerState is told by name: hand in the named_parameters of the model that it trains; under "
                "a PrecisionPolicy hand in policy.named_parameters, and call policy.adopt(optimizer) before"
            )
        return {name: dict(state.get(parameter, {})) for name, parameter in names.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state in its stored dtypes (torch's own loader casts them to the parameter's dtype).

        Raises:
            CheckpointError: the names or shapes differ from the model's.
        """
        names = self.names
        extra, missing = sorted(set(state) - set(names)), sorted(set(names) - set(state))
        if extra or missing:
            raise CheckpointError(
                f"optimizer state does not fit the model: {len(missing)} weights have none {missing[:3]}, "
                f"{len(extra)} are not in the model or not trained {extra[:3]}"
            )
        for name, values in state.items():
            if not values:
                continue
            parameter = names[name]
            state = {key: _placed(value, parameter, name) for key, value in values.items()}
            if self.cast:
                state = {key: value.to(parameter.dtype) if _averages(value) else value for key, value in state.items()}
            self.optimizer.state[parameter] = state


def _averages(value: Any) -> bool:
    """Whether it is a running mean, not a step counter."""
    return isinstance(value, torch.Tensor) and value.ndim > 0 and value.is_floating_point()


def _placed(value: Any, parameter: nn.Parameter, name: str) -> Any:
    """A copy of a state value on the parameter's device. Step counters stay where fused AdamW keeps them."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.ndim and value.shape != parameter.shape:
        raise CheckpointError(
            f"optimizer state of {name} has shape {tuple(value.shape)}, the weight has {tuple(parameter.shape)}"
        )
    return value.to(parameter.device, copy=True)
