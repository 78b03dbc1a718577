"""AdamW, and the learning-rate schedule as a pure function of the step."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.optim import AdamW, Optimizer

from rawloop.errors import UserError


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
