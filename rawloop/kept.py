"""What a capsule holds of a run's step: its batches and the state that it started from; and the forward pass again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from rawloop.contracts import Batch, Labels
from rawloop.losses import weighted_mean
from rawloop.precision.gradients import Measured
from rawloop.precision.policy import PrecisionPolicy
from rawloop.run import Run
from rawloop.watch.capsule import Capsule
from rawloop.watch.rerun import digests, run_again
from rawloop.watch.subject import Pass


@dataclass(frozen=True)
class Again:
    """The forward pass of one micro-batch, as training runs it, outside DDP.

    `module` is the bare `LossModule`, whose model `policy` has prepared; `targets` counts the window over all ranks.
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


def batch_state(batch: Batch) -> dict[str, Any]:
    """Return a batch as nested values that can be stored."""
    labels = {stream: {"positions": one.positions, "targets": one.targets} for stream, one in batch.labels.items()}
    return {"inputs": dict(batch.inputs), "labels": labels, "targets": dict(batch.targets), "ids": list(batch.ids)}


def batch_from(state: Mapping[str, Any]) -> Batch:
    """Return the batch of a `batch_state`."""
    labels = {stream: Labels(one["positions"], one["targets"]) for stream, one in state["labels"].items()}
    return Batch(state["inputs"], labels, state["targets"], state["ids"])


@dataclass
class Window:
    """The window of a step as far as it has come, with the random streams before each pass and its unscaled loss.

    `targets` counts over all ranks.
    """

    batches: list[Batch]
    targets: dict[str, int]
    rng: list[dict[str, Any]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)

    def state(self, *, with_losses: bool) -> dict[str, Any]:
        """Return the window as nested values; losses are on the device. A pass that has not ended has no loss."""
        losses = self.losses if with_losses else []
        rows = zip_longest(map(batch_state, self.batches), self.rng, losses)
        return {"passes": [{"batch": batch, "rng": rng or {}, "loss": loss} for batch, rng, loss in rows]}


def contents(
    run: Run, facts: dict[str, Any], window: Window, passes: Sequence[Pass], found: Measured | None, *, host_only: bool
) -> Capsule:
    """Return the contents of a capsule of a run's step, before its update.

    `passes` are those that have ended; `found` is None if the step has failed before its gradients were measured. With
    `host_only` nothing is read from the device, and no weights are taken.
    """
    slot = run.checkpoints.newest() if run.checkpoints else None
    facts |= {
        "kind": "run",
        "window": run.state.window,
        "precision": run.policy.name,
        "targets": window.targets,
        "scale": run.policy.window.scale,
        "moves_twice": bool(run.buffers and run.buffers.twice),
        "follows": slot and str(slot),
    }
    states: dict[str, Any] = {"passes": window.state(with_losses=not host_only)}
    if host_only:
        facts["left_out"] = {"weights": "the step had changed them in part, or the device could not be read"}
        return Capsule(facts, states)
    trained, before = run.policy.trained.weights, run.buffers.before() if run.buffers else []
    buffers = dict(zip(run.buffers.places, before, strict=True)) if run.buffers else {}
    states["weights"] = {"trained": dict(trained), "buffers": buffers, "policy": run.policy.state_dict()}
    parts = run.checkpoints.parts.states if run.checkpoints else {}
    states |= {name: parts[name].state_dict() for name in ("base", "optimizer") if name in parts}
    gradients = {name: weight.grad for name, weight in trained.items() if weight.grad is not None}
    if found is not None and run.world.size == 1:
        facts["left_on_gradients"] = found.scale  # torch's scaler has divided them in place
        facts["gradients"] = digests(gradients)
    elif found is not None:  # those of this rank, before they were averaged
        assert run.policy.model is not None
        again = run_again(run.policy.model, trained.items(), passes, buffers=run.buffers, before=before)
        facts["gradients"] = digests(again.gradients)
    return Capsule(facts, states)
