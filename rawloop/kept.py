"""What a capsule holds of a run's step: its batches and the state that it started from; and the forward pass again."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from rawloop.contracts import Batch, Labels
from rawloop.losses import weighted_mean
from rawloop.precision.policy import PrecisionPolicy
from rawloop.run import Run


def scaled_loss(
    module: nn.Module,
    policy: PrecisionPolicy,
    weights: Mapping[str, float],
    targets: Mapping[str, int],
    ranks: int,
    scale: float,
    batch: Batch,
) -> Tensor:
    """Run a forward pass as training does, outside DDP, and return the tensor from which its backward pass starts.

    Args:
        module: the bare `LossModule`.
        policy: has prepared its model.
        weights: of the streams.
        targets: of the window, over all ranks.
        ranks: their number.
        scale: the loss scale.
        batch: one micro-batch, on any device.
    """
    with policy.autocast():
        losses = module(batch.to(policy.device))
    return weighted_mean(losses, weights, targets, ranks).float() * scale


def trained_state(run: Run) -> dict[str, Any]:
    """Return the state that the step started from: trained weights, buffers before the window, policy, optimizer."""
    buffers = dict(zip(run.buffers.places, run.buffers.before(), strict=True)) if run.buffers else {}
    trained = {name: weight.detach() for name, weight in run.policy.trained.weights.items()}
    states = {"weights": {"trained": trained, "buffers": buffers, "policy": run.policy.state_dict()}}
    parts = run.checkpoints.parts.states if run.checkpoints else {}
    return states | {name: parts[name].state_dict() for name in ("base", "optimizer") if name in parts}


def batch_state(batch: Batch) -> dict[str, Any]:
    """Return a batch as nested values that can be stored."""
    labels = {stream: {"positions": one.positions, "targets": one.targets} for stream, one in batch.labels.items()}
    return {"inputs": dict(batch.inputs), "labels": labels, "targets": dict(batch.targets), "ids": list(batch.ids)}


def batch_from(state: Mapping[str, Any]) -> Batch:
    """Return the batch of a `batch_state`."""
    labels = {stream: Labels(one["positions"], one["targets"]) for stream, one in state["labels"].items()}
    return Batch(state["inputs"], labels, state["targets"], state["ids"])
