"""Messages about numbers that are not finite, and about updates that rounding loses."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rawloop.precision.masters import TrainedWeights
from rawloop.rounding import expected_change
from rawloop.sharding import is_sharded, over_ranks


def explain_nonfinite(model: nn.Module, what: str, moved: Sequence[Tensor], fp16: bool) -> str:
    """Return the likely source of numbers that are not finite, and what to do. This waits for the device.

    Args:
        model: the trained model.
        what: what is not finite: `loss`, `norm` (of the gradients) or `buffers`.
        moved: buffers that this window has changed, so their values say nothing about the model before it.
        fp16: whether the mode computes in FP16.
    """
    changed = {id(buffer) for buffer in moved}
    buffers = dict(model.named_buffers())
    damaged = [name for name, p in model.named_parameters() if not over_ranks(torch.isfinite(p.detach()).all())]
    # In buffers only NaN is damage: masks contain -inf.
    damaged += [name for name, b in buffers.items() if id(b) not in changed and bool(torch.isnan(b).any())]
    if damaged:
        return (
            f"{len(damaged)} of the model's weights and buffers are not finite, first {damaged[0]}: no loss can be "
            "finite with them. Start from an earlier checkpoint, or download the base model again"
        )
    wider = "a mode of a larger range than FP16 (bf16, fp32)"
    samples = "look at the samples that the last skips name (events.jsonl)"
    causes = f"{samples} for numbers that are not finite or too large{f', or take {wider}' if fp16 else ''}"
    if what == "loss":
        return f"The model's weights are finite, its losses are not: {causes}"
    if what == "norm":
        finding = "the finding `not_finite` of the watch, which names the operation and its module"
        look = f"or set parallel to ddp for {finding}" if is_sharded(model) else f"and at {finding}"
        causes = f"its backward pass produces them, as sqrt does at zero: {samples}, {look}"
        causes = f"lower the learning rate, or take {wider}" if fp16 else causes
        return f"The model's weights and losses are finite, the gradients are not: {causes}"
    names = [name for name, b in buffers.items() if id(b) in changed and not bool(b.isfinite().all())]
    other = f"if the base model came with this {names[0]}, use another one; else " if names else ""
    return f"The model's weights and losses are finite, the buffers that move are not: {other}{causes}"


def lost_updates(trained: TrainedWeights, optimizer: Optimizer) -> str:
    """Return a warning about the updates that 16-bit weights lose without masters."""
    lost = _share((weight.float() + size).to(weight.dtype) == weight for weight, size in _usual(trained, optimizer))
    return (
        f"{trained.dtype} weights are trained without masters: at a learning rate of {_largest_rate(optimizer):g} "
        f"about {lost:.0%} of updates round to nothing; precision.masters 'fp32' keeps them, 'stochastic' does in the "
        "mean"
    )


def rounded_updates(trained: TrainedWeights, optimizer: Optimizer) -> str:
    """Return how many weights the first update will change if updates are rounded stochastically, else nothing."""
    if not trained.rounding:
        return ""
    changed = _share(expected_change(weight, size) for weight, size in _usual(trained, optimizer))
    return (
        f", rounded stochastically: at a learning rate of {_largest_rate(optimizer):g} an update changes about "
        f"{changed:.1%} of the numbers, and in the mean none is lost"
    )


def _usual(trained: TrainedWeights, optimizer: Optimizer) -> Iterator[tuple[Tensor, Tensor | float]]:
    """Yield the weights that an optimizer updates, each with the usual size of an update."""
    for group in optimizer.param_groups:
        for held in group["params"]:
            weight = trained.weight_of(held).detach()
            yield weight, usual_update(weight, group)


def _largest_rate(optimizer: Optimizer) -> float:
    return max(float(group["lr"]) for group in optimizer.param_groups)


def usual_update(weight: Tensor, group: Mapping[str, Any]) -> Tensor | float:
    """Return the usual size of the update of a weight's numbers, for the options of its group.

    It is `lr` for Adam and its kind, and for Lion. Adafactor multiplies it by the weight's rms (arXiv:1804.04235,
    algorithm 4), and Muon's matrices move by 0.2 lr (arXiv:2502.16982, section 2.2).
    """
    lr = float(group["lr"])
    if "beta2_decay" in group:
        return lr * over_ranks(weight.float().square().mean()).sqrt().clamp(min=group["eps"][1])
    return 0.2 * lr if group.get("adjust_lr_fn") == "match_rms_adamw" else lr


def share_of_lost_updates(weights: Iterable[Tensor], lr: float) -> float:
    """Return the share of weights that an update of size `lr`, Adam's usual one, does not change."""
    return _share((weight.float() + lr).to(weight.dtype) == weight for weight in weights)


def _share(found: Iterable[Tensor]) -> float:
    """Return the mean of flags or probabilities over all tensors."""
    summed = total = 0.0
    for each in found:
        summed += float(over_ranks(each.sum()))
        total += each.numel()
    return summed / total if total else 0.0
