"""The findings that a run makes itself: what its policy mends, and spikes."""

from collections.abc import Iterator

import torch
from torch.optim import Optimizer

from rawloop.errors import first_few
from rawloop.precision.policy import PrecisionPolicy
from rawloop.watch.findings import Cause, Finding, Place
from rawloop.watch.subject import StepRecord


def mended(policy: PrecisionPolicy, optimizer: Optimizer, step: int) -> Iterator[Finding]:
    """Yield, as an ordinary finding, what the policy does so that training works in its mode."""
    done = []
    evidence: dict[str, float | int | str] = {"mode": policy.name}
    if policy.trained.masters:
        name = next(iter(policy.trained.masters))
        ulp = torch.finfo(policy.trained.dtype).eps
        done.append(
            f"{len(policy.trained.masters)} weights in {policy.trained.dtype} have float32 masters in the optimizer, "
            f"where eps and small updates act"
        )
        evidence |= {"first": name, "smallest relative change of a weight": ulp}
    if policy.scaler:
        done.append("the loss is multiplied by a scale that has a floor, because small FP16 gradients would be zero")
        evidence |= {"scale": policy.scaler.scale, "floor": policy.scaler.config.floor}
    if done:
        groups = optimizer.param_groups
        evidence |= {"eps": float(groups[0]["eps"])} if "eps" in groups[0] else {}
        place = Place(optimizer=type(optimizer).__name__)
        cause = Cause("precision", f"the policy does this by itself in {policy.name}", place, evidence)
        yield Finding("policy_mends", "; ".join(done), (cause,), step, policy.world.rank, ordinary=True)


def spiked(reason: str, record: StepRecord, rank: int) -> Finding:
    """Return the finding of a spike, whose samples are the first that one looks at."""
    shown = first_few(record.ids)
    cause = Cause(
        "data",
        "the samples of this step are unlike those before, or the update before it was too large",
        Place(sample=shown, rank=rank),
        {"loss": record.loss or 0.0, "gradient norm": record.grad_norm or 0.0},
        "Look at the samples, and at the learning rate; `rawloop replay` with --bisect shows which sample weighs most",
    )
    return Finding("spike", reason, (cause,), record.step, rank)
