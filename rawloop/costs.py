"""The operations of a step, and the rate at which a device could do them: for MFU."""

from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import nn

from rawloop.allocations import grouped_flops
from rawloop.buffers import untouched
from rawloop.cards import card_of
from rawloop.contracts import Batch
from rawloop.precision.policy import PrecisionPolicy
from rawloop.throughput import Cost


def rate_of(device: torch.device, mode: str, tf32: bool) -> float | None:
    """Return the operations per second of a device in a precision mode; None if they are not known."""
    card = card_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    rate = card.tflops(mode, tf32) if card else None
    return rate * 1e12 if rate else None


class Operations(NamedTuple):
    """Floating-point operations of a forward pass: products of activations (attention), and all others."""

    attention: int
    others: int


def step_cost(module: nn.Module, batch: Batch, peak: float, policy: PrecisionPolicy) -> Cost | None:
    """Count the operations of a micro-batch; None if the batch does not count its positions.

    The forward pass is counted, matrix products and attention, on the batch as it is: heads at their targets, experts
    as they are chosen. Backward takes as much for the gradients of activations, and as much again for those of weights
    (Chowdhery et al. 2022, PaLM, appendix B), of which frozen weights have none: 4 operations per frozen and 6 per
    trained weight. Attention multiplies activations by activations, so its backward takes twice its forward, whatever
    is frozen. What is computed again (activation checkpointing, chunks of the head) does not count.
    """
    if not batch.work.get("positions"):
        return None
    forward = forward_operations(module, batch.to(policy.device), policy.autocast())
    operations = 3 * forward.attention + (2 + trained_share(module)) * forward.others
    return Cost(operations / batch.work["positions"], peak)


def forward_operations(module: nn.Module, batch: Batch, autocast: AbstractContextManager[None]) -> Operations:
    """Count a forward pass. Batched products (bmm) are attention's, too. The module does not change."""
    from torch.utils.flop_counter import FlopCounterMode

    experts: Any = {torch.ops.aten._grouped_mm: grouped_flops}
    if hasattr(torch.ops.transformers, "grouped_mm_fallback"):
        experts[torch.ops.transformers.grouped_mm_fallback] = grouped_flops
    counter = FlopCounterMode(display=False, custom_mapping=experts)
    with untouched(module, training=False), torch.no_grad(), autocast, counter:
        module(batch)
    counts = counter.get_flop_counts()["Global"]
    attention = sum(count for kind, count in counts.items() if "attention" in str(kind) or "bmm" in str(kind))
    return Operations(attention, counter.get_total_flops() - attention)


def trained_share(module: nn.Module) -> float:
    """Return the share of trained weights among those of matrix products."""
    tables = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    matrices = [weight for weight in module.parameters() if weight.dim() > 1 and id(weight) not in tables]
    trained = sum(weight.numel() for weight in matrices if weight.requires_grad)
    return trained / max(1, sum(weight.numel() for weight in matrices))
