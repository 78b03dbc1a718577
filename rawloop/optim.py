"""AdamW, and the learning-rate schedule as a pure function of the step."""

import math
from collections.abc import Iterable

from torch import nn
from torch.optim import AdamW, Optimizer

from rawloop.settings import OptimConfig as OptimConfig


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
    """Set the learning rate of the parameter group with the largest one; the others keep their ratio to it.

    As torch's schedulers do, it keeps the rates that the groups were made with under `initial_lr`.
    """
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    largest = max(group["initial_lr"] for group in optimizer.param_groups)
    for group in optimizer.param_groups:
        group["lr"] = lr * (group["initial_lr"] / largest) if largest else lr
