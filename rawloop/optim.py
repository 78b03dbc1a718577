"""AdamW, and the learning rate as a function of the step."""

import math
from collections.abc import Iterable

from torch import nn
from torch.optim import AdamW, Optimizer

from rawloop.settings import OptimConfig as OptimConfig


def build_optimizer(named: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> AdamW:
    """Return fused AdamW over trainable parameters.

    Args:
        named: `PrecisionPolicy.named_parameters()`, or a model's.
        config: learning rate, betas and weight decay. Only matrices decay.
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
    """Return the learning rate of the update from `step` to `step + 1`, of `total` updates.

    Warm-up is linear, and its last step has the rate `lr`. The decay over the remaining steps would reach 0 one step
    after the last.
    """
    warmup = config.warmup(total)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    if config.schedule == "linear":
        return config.lr * (1.0 - progress)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * progress))


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of the parameter group with the largest rate; other groups keep their ratio to it.

    The first rates of the groups are kept as `initial_lr`, as in torch's schedulers.
    """
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    largest = max(group["initial_lr"] for group in optimizer.param_groups)
    for group in optimizer.param_groups:
        group["lr"] = lr * (group["initial_lr"] / largest) if largest else lr
