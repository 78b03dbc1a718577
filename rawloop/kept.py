"""What a capsule holds of a run's step: its batches and the state that it started from; and the forward pass again."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rawloop.contracts import Batch, Labels
from rawloop.losses import weighted_mean
from rawloop.precision.policy import PrecisionPolicy
from rawloop.run import Run


@dataclass(frozen=True)
class Again:
    """The forward pass of one micro-batch, as training runs it, outside DDP.

    Args:
        module: the bare `LossModule`.
        policy: has prepared its model.
        weights: of the streams.
        targets: of the window, over all ranks.
        ranks: their number.
        scale: the loss scale.
        batch: the micro-batch, on any device.
    """

    module: nn.Module
    policy: PrecisionPolicy
    weights: Mapping[str, float]
    targets: Mapping[str, int]
    ranks: int
    scale: float
    batch: Batch

    @property
    def inputs(self) -> dict[str, Any]:
        """The inputs of the model, and the numbers of the rows that they are."""
        size = next(iter(self.batch.inputs.values())).shape[0]
        return {"rows": torch.arange(size), **self.batch.inputs}

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the tensor from which the backward pass starts. If `rows` are other ones, the labels follow them."""
        rows = inputs["rows"].tolist()
        given = {name: tensor for name, tensor in inputs.items() if name != "rows"}
        batch = replace(self.batch, inputs=given)
        if rows != list(range(len(rows))) and "input_ids" in given:
            length = given["input_ids"].shape[1]
            batch.labels = {stream: _of_rows(labels, rows, length) for stream, labels in self.batch.labels.items()}
        with self.policy.autocast():
            losses = self.module(batch.to(self.policy.device))
        return weighted_mean(losses, self.weights, self.targets, self.ranks).float() * self.scale


def _of_rows(labels: Labels, rows: list[int], length: int) -> Labels:
    """Return the labels of a batch whose row number n is `rows[n]`; a row has `length` positions."""
    row_of = torch.div(labels.positions, length, rounding_mode="floor")
    chosen = [(row_of == row).nonzero().squeeze(1) for row in rows]
    shifts = [torch.full_like(found, (n - rows[n]) * length) for n, found in enumerate(chosen)]
    found = torch.cat(chosen)
    return Labels(labels.positions[found] + torch.cat(shifts), labels.targets[found])


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
