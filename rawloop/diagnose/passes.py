"""The passes of the checks before step 0: losses, logits and gradients of a batch, and the causes of their failures.

A sharded model needs all ranks in each pass, and their numbers differ, so these ranks run in step.
"""

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rawloop.buffers import untouched
from rawloop.contracts import Batch, Family, StreamLoss
from rawloop.diagnose.notfinite import cause, cause_in_samples
from rawloop.diagnose.shared import Autocast
from rawloop.dist import World
from rawloop.in_step import InStep
from rawloop.losses import LossModule
from rawloop.origin import damaged
from rawloop.seed import preserved_rng
from rawloop.sharding import is_sharded, part_of

DETACHED = "its loss is detached: it depends on no trained weight"
ZERO = "its gradient is zero in every trained weight"
WHOLE = "set parallel to ddp to find the operation"
FORWARD, GRADIENT = 0, 1  # kinds of passes


class Reduced(NamedTuple):
    """A gradient over all ranks: whether their losses depend on trained weights, and whether it is finite, and zero."""

    connected: bool
    finite: bool
    zero: bool


class Passes:
    """Forward and backward passes of one model, and the causes of their failures.

    Args:
        family: of the model.
        module: the model with its loss.
        autocast: returns the context of training's forward passes.
        batches: on the model's device.
        groups: the examples of each batch; empty if unknown.
        world: the ranks, which run in step if the module is sharded. Each then calls `finish`.
    """

    def __init__(
        self,
        family: Family,
        module: LossModule,
        autocast: Autocast,
        batches: Sequence[Batch],
        groups: Sequence[Sequence[Any]] = (),
        world: World | None = None,
    ) -> None:
        self.family, self.module, self.autocast = family, module, autocast
        self.examples = {id(batch): group for batch, group in zip(batches, groups, strict=False)}
        self.in_step: InStep | None = None
        self.left_out: set[str] = set()  # streams whose gradient is not looked at
        if world is not None and is_sharded(module):
            self.in_step = InStep(world, (partial(self._fill, batches[0]), partial(self._fill_gradient, batches[0])))
            found = world.gather(damaged(module.model))
            self.damage = next((f"{damage} on rank {rank}" for rank, damage in enumerate(found) if damage), None)

    def finish(self) -> None:
        """Run the passes with which other ranks are not done."""
        if self.in_step is not None:
            self.in_step.finish()

    def leave_out(self, streams: Collection[str]) -> None:
        """Look at no gradient of these streams, whose loss is not finite; in step, of those of all ranks."""
        self.left_out = {*streams}
        if self.in_step is not None:
            self.in_step.finish()
            flags = self.in_step.world.any([stream in streams for stream in self.family.streams])
            self.left_out = {stream for stream, flag in zip(self.family.streams, flags, strict=True) if flag}

    def losses(self, batch: Batch) -> dict[str, StreamLoss]:
        """Return every stream's loss, in the precision of training."""
        losses: dict[str, StreamLoss] = self._forward(partial(self.module, batch))
        return losses

    def logits(self, batch: Batch) -> dict[str, Tensor]:
        """Return every target's logits by stream, with the same random numbers as `losses`."""
        logits: dict[str, Tensor] = self._forward(partial(self.module, batch, self.family.logits))
        return logits

    def _forward(self, run: partial[Any]) -> Any:
        with preserved_rng(), self.autocast():
            return self.in_step.run(FORWARD, run) if self.in_step is not None else run()

    def _fill(self, batch: Batch) -> None:
        with untouched(self.module, training=False), torch.no_grad(), preserved_rng(), self.autocast():
            self.module(batch)

    def gradient(self, batch: Batch, stream: str) -> tuple[str, str]:
        """Return why no trained weight learns from a stream, and why its gradient is not finite; or empty strings."""
        if self.in_step is not None:
            return self._gradient_of_all(batch, stream, self.in_step)
        total = self._total(batch, stream)
        if not total.requires_grad:
            return DETACHED, ""
        gradients = [gradient for gradient in self._gradients(total) if gradient is not None]
        if not gradients:
            return "no trained weight gets a gradient from it: it depends only on frozen weights", ""
        if not all(bool(gradient.isfinite().all()) for gradient in gradients) and not self._is_mean_finite(
            batch, stream
        ):
            run = partial(self._mean, stream=stream)
            found = cause(self.module.model, batch, self._alone(batch), run, backward=True)
            return "", f"its loss is finite, and its gradient is not: {found}"
        none = not any(bool(gradient.count_nonzero()) for gradient in gradients)
        return ZERO if none else "", ""

    def _gradient_of_all(self, batch: Batch, stream: str, in_step: InStep) -> tuple[str, str]:
        """Do the same with a sharded model, for the mean of all ranks' gradients."""
        for scale in (1.0, 1 / max(1, batch.targets[stream])):  # a sum may overflow in FP16
            found = in_step.run(GRADIENT, partial(self._reduced, batch, stream, scale))
            if not found.connected:
                return DETACHED, ""
            if found.finite:
                return ZERO if found.zero else "", ""
        samples = f"the samples {', '.join(batch.ids)}, or those of another rank"
        return "", f"its loss is finite, and its gradient is not: {self.damage or f'{samples}; {WHOLE}'}"

    def _fill_gradient(self, batch: Batch) -> None:
        with untouched(self.module, training=True), torch.enable_grad():
            self._reduced(batch, None, 0.0)

    def _reduced(self, batch: Batch, stream: str | None, scale: float) -> Reduced:
        """Run a sharded model forward, and backward from `scale` times a stream's loss, or all that are looked at."""
        assert self.in_step is not None
        with preserved_rng(), self.autocast():
            losses: dict[str, StreamLoss] = self.module(batch)
        chosen = [loss.total for name, loss in losses.items() if stream in (None, name) and name not in self.left_out]
        total = torch.stack(chosen).sum().float() * scale
        world = self.in_step.world
        if world.any([not total.requires_grad])[0]:
            return Reduced(False, True, True)
        torch.autograd.backward(total)
        parts = [part_of(weight.grad) for weight in self.module.parameters() if weight.grad is not None]
        for weight in self.module.parameters():
            weight.grad = None
        wrong = not all(bool(part.isfinite().all()) for part in parts)
        wrong_somewhere, some = world.any([wrong, any(bool(part.count_nonzero()) for part in parts)])
        return Reduced(True, not wrong_somewhere, not some)

    def why_not_finite(self, batch: Batch, stream: str) -> str:
        """Return the cause of a loss that is not finite; see `rawloop.diagnose.notfinite`."""

        def run(one: Batch) -> Tensor:
            return self.losses(one)[stream].total

        if self.in_step is None:
            found = cause(self.module.model, batch, self._alone(batch), run)
        else:
            found = self.damage or f"{cause_in_samples(batch, self._alone(batch), run)}; {WHOLE}"
        return f"its loss is not finite: {found}"

    def _alone(self, batch: Batch) -> list[Batch]:
        device = next(self.module.parameters()).device
        return [self.family.collate([example]).to(device) for example in self.examples.get(id(batch), ())]

    def _total(self, batch: Batch, stream: str) -> Tensor:
        with torch.enable_grad():
            return self.losses(batch)[stream].total.float()

    def _mean(self, batch: Batch, stream: str) -> Tensor:
        return self._total(batch, stream) / max(1, batch.targets[stream])

    def _gradients(self, total: Tensor) -> Sequence[Tensor | None]:
        weights = [weight for weight in self.module.parameters() if weight.requires_grad]
        return torch.autograd.grad(total, weights, allow_unused=True)

    def _is_mean_finite(self, batch: Batch, stream: str) -> bool:
        """Return whether the mean loss, which training uses, has finite gradients: a sum may overflow in FP16."""
        gradients = self._gradients(self._mean(batch, stream))
        return all(bool(gradient.isfinite().all()) for gradient in gradients if gradient is not None)
