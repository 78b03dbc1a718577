"""What is announced is what happens: weights, dtypes, streams and optimizer of a finished run against its config."""

from collections import Counter

import torch
from torch import nn
from torch.optim import Optimizer

from rawloop.config import RunConfig
from rawloop.contracts import Family
from rawloop.dist import unwrap_ddp
from rawloop.errors import RawloopError, UserError
from rawloop.losses import LossModule
from rawloop.precision import PrecisionPolicy
from rawloop.precision.modes import DTYPES, MODES


def check_streams(config: RunConfig, family: Family) -> None:
    """Refuse a family that does not weigh its streams as the config says.

    Raises:
        UserError: it has another weight for a stream, or none.
    """
    for stream, weight in config.model.stream_weights.items():
        own = family.stream_weights.get(stream, 0.0)
        if own != weight:
            raise UserError(
                f"model.stream_weights.{stream} is {weight:g}, and the family {type(family).__name__} weighs it "
                f"{own:g} (it has {dict(family.stream_weights)}): a family takes them from its config"
            )


def announce(
    config: RunConfig, family: Family, module: nn.Module, policy: PrecisionPolicy, optimizer: Optimizer
) -> str:
    """Read off the finished module, in DDP or not, what is trained and in which dtypes, and return it in a line.

    Raises:
        RawloopError: other weights are trained than the policy steps and the optimizer holds, or in another dtype.
    """
    wrapped = unwrap_ddp(module)
    assert isinstance(wrapped, LossModule)
    named = dict(wrapped.model.named_parameters())
    trained = {name: weight for name, weight in named.items() if weight.requires_grad}
    stepped = dict(policy.named_parameters())
    held = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    without = {name for name, weight in stepped.items() if id(weight) not in held}
    for what, names in (
        ("are trained by the model and not by the precision policy", set(trained) - set(stepped)),
        ("are trained by the precision policy and not by the model", set(stepped) - set(trained)),
        ("are trained, and the optimizer does not hold them", without),
    ):
        if names:
            raise RawloopError(f"{len(names)} weights {what}, first {min(names)}: this is not what was asked for")
    wanted = config.precision.trainable_dtype if policy.name == config.precision.mode else "auto"
    allowed = MODES[policy.name].trainable if wanted == "auto" else (wanted,)
    for name, weight in trained.items():
        if weight.dtype not in {DTYPES[kind] for kind in allowed}:
            raise RawloopError(
                f"{name} would be trained in {_short(weight.dtype)}, and precision {policy.name} trains "
                f"{' or '.join(allowed)}"
            )
    frozen = [weight for name, weight in named.items() if name not in trained]
    streams = ", ".join(f"{stream} x {weight:g}" for stream, weight in family.stream_weights.items())
    kept = f", beside {_dtypes(frozen)} frozen" if frozen else ""
    return f"training {_dtypes(list(trained.values()))} weights{kept}; streams: {streams}"


def _dtypes(weights: list[nn.Parameter]) -> str:
    """How many numbers of which dtype, such as `1,536 float32`."""
    counts: Counter[str] = Counter()
    for weight in weights:
        counts[_short(weight.dtype)] += weight.numel()
    return " and ".join(f"{count:,} {kind}" for kind, count in counts.most_common())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
