"""What to tell the user about numbers that are not finite, and about a loss that trains nothing."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from rawloop.precision.masters import TrainedWeights


def found_out(model: nn.Module, what: str, moved: Sequence[Tensor], fp16: bool) -> str:
    """Where numbers that are not finite come from, as far as can be seen, and what to do. It waits for the device.

    Args:
        model: the trained model.
        what: what is not finite: `loss`, `norm` (of the gradients) or `buffers`.
        moved: buffers that this window has moved: they do not tell what was there before.
        fp16: whether the mode computes in FP16.
    """
    fresh = {id(buffer) for buffer in moved}
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if id(buffer) not in fresh]
    # of buffers NaN alone: the -inf of a mask is healthy
    spoilt = [name for name, p in model.named_parameters() if not bool(torch.isfinite(p.detach()).all())]
    spoilt += [name for name, buffer in buffers if bool(torch.isnan(buffer).any())]
    if spoilt:
        return (
            f"{len(spoilt)} of the model's weights and buffers are not finite, first {spoilt[0]}: no loss can be "
            "finite with them. Begin with finite ones, of an earlier checkpoint, or of the base model fetched again"
        )
    samples = "look at the samples that the last skips name (events.jsonl)"
    if what == "norm" and fp16:
        advice = "take a lower learning rate, or a mode of more range than FP16 (bf16, fp32)"
    elif what == "norm":
        advice = f"its backward pass makes them (the root of zero): {samples} under torch.autograd.detect_anomaly()"
    else:
        more = ", or take a mode of more range than FP16 (bf16, fp32)" if fp16 else ""
        advice = f"{samples} for what is not finite or too large in them{more}"
        names = [name for name, b in model.named_buffers() if id(b) in fresh and not bool(b.isfinite().all())]
        if what == "buffers" and names:
            advice = f"if the model came with {names[0]} so, begin with another one; else {advice}"
    healthy = {"loss": "weights are finite, its losses", "norm": "weights and losses are finite, the gradients"}
    return f"The model's {healthy.get(what, 'weights and losses are finite, the buffers that move')} are not: {advice}"


def lost_updates(trained: TrainedWeights, lr: float) -> str:
    """A warning of what trained weights in 16 bits lose without masters."""
    share = share_of_lost_updates((weight.detach() for weight in trained.weights.values()), lr)
    return (
        f"{trained.dtype} weights are trained without masters: at a learning rate of {lr:g} about {share:.0%} of "
        "updates round to nothing; precision.masters 'fp32' keeps them"
    )


def unit_in_last_place(weight: Tensor) -> Tensor:
    """The distance from each number to the next larger one of its dtype, float32."""
    info = torch.finfo(weight.dtype)
    _, exponent = torch.frexp(weight.detach().float())  # |w| = m x 2^exponent with m in [0.5, 1)
    power = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent - 1)
    power = torch.where(weight == 0, info.smallest_normal, power.clamp(min=info.smallest_normal))
    return power * info.eps


def share_of_lost_updates(weights: Iterable[Tensor], lr: float) -> float:
    """The share of weights that an update of size `lr`, Adam's usual one, would leave as they are.

    An update below half a unit in the last place rounds to nothing.
    """
    lost = total = 0
    for weight in weights:
        lost += int((unit_in_last_place(weight) / 2 > lr).sum())
        total += weight.numel()
    return lost / total if total else 0.0
