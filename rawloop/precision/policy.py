"""The precision policy: autocast, the backward pass, and whether an update is applied.

The modes are rows of a table, so every loop and the evaluator call the same methods in every mode. If a mode does not
work, all ranks switch to the next one of `precision.fallback` at the same step boundary.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rawloop.dist import find_ddp
from rawloop.errors import InterruptedUpdate, TrainingError, UserError
from rawloop.precision.advice import explain_nonfinite
from rawloop.precision.gradients import (
    ELSEWHERE,
    Measured,
    StepResult,
    Window,
    connected,
    drop_scaler_marks,
    global_norm,
    measure,
)
from rawloop.precision.masters import held_by
from rawloop.precision.prepared import PreparedModel

NOT_FINITE = {"loss": "losses", "norm": "gradients", "buffers": "moving buffers"}
UNCONNECTED = (
    "on at least one rank, no weight of the optimizer got a gradient: the loss depends on frozen weights, on another "
    "model, or on a new tensor with requires_grad=True"
)


class PrecisionPolicy(PreparedModel):
    """Applies one precision mode to a model, in rawloop's loop or in your own.

    Args:
        config: the settings, or the name of a mode.
        device: where the model runs; the world's device by default.
        world: the ranks, which agree at each step; `World.current()` by default.
        grad_scaler: your own torch GradScaler, for amp_fp16.
        resume: the `state_dict` of the run to resume. The policy continues in the mode that the run fell back to. Call
            `load_state_dict` with the same state after weights and optimizer are loaded.
        say: called with each message for the user.
        seed: of the random numbers of stochastic rounding; the same on all ranks.

    Raises:
        UserError: the device does not support the mode, the settings contradict each other, or `world` has fewer ranks
            than there are processes.
    """

    def backward(self, loss: Tensor, *, inputs: Iterable[Tensor] | None = None, retain_graph: bool = False) -> None:
        """Run the backward pass on the scaled loss. Gradients accumulate until `step`.

        The first pass after a step drops gradients that no step has applied, such as those that the loss of a GAN's
        generator leaves on the discriminator.

        Args:
            loss: a tensor with one number.
            inputs: the weights that get a gradient; all by default.
            retain_graph: keep the graph for another backward pass.

        Raises:
            UserError: the loss is not a tensor with one number, or `unscale` was called since the last step.
            TrainingError: the loss depends on no trainable weight.
        """
        value = connected(loss).detach()
        if value.ndim or value.dtype != torch.float32:
            value = value.float().reshape(())
        if self.window.closed or self.window.dropped:
            self.zero_grad()
        if self.window.unscaled:
            raise UserError(
                "policy.backward was called between policy.unscale(optimizer) and policy.step(optimizer): its "
                "gradients would be added at another scale; unscale after the last backward pass"
            )
        scaled = self.scaler.apply(loss) if self.scaler else loss.float()
        weights = None if inputs is None else [self.trained.weight_of(tensor) for tensor in inputs]
        torch.autograd.backward(scaled, inputs=weights, retain_graph=retain_graph)
        self.window.add(value, self.scaler.scale if self.scaler else 1.0, self._ddp_modules())

    def _ddp_modules(self) -> list[Any]:
        if self.world.size == 1:
            return []
        if self._ddp is None or any(reference() is None for reference in self._ddp):
            self._ddp = [ref(ddp) for ddp in find_ddp(self.trained.weights.values())]
        return [ddp for reference in self._ddp if (ddp := reference()) is not None]

    def zero_grad(self, *optimizers: Optimizer) -> None:
        """Drop the gradients of the optimizers' weights, or all gradients if no optimizer is given.

        `optimizer.zero_grad()` does not clear the gradients of weights that have masters.
        """
        drop_scaler_marks(optimizers)
        self.trained.clear_gradients(held_by(optimizers) if optimizers else None)
        if all(weight.grad is None for weight in self.trained.weights.values()):
            self.window = Window(self.trained)
            if self.scaler:
                self.scaler.clear()

    def unscale(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the loss scale, so that you can clip or read them before `step`.

        They are set on the model's weights and on the parameters that the optimizer holds. With masters they are
        float32, which takes 4 bytes per weight until `step`.

        Raises:
            UserError: see `step`.
        """
        held = self._params_of([optimizer])
        gradients = [gradient for p in held if (gradient := self.trained.weight_of(p).grad) is not None]
        if not gradients or id(optimizer) in self.window.unscaled:
            return
        self.window.check([optimizer], held)
        self.window.unscaled[id(optimizer)] = global_norm(gradients)
        scale = self.scaler.unscale([optimizer], self.window.scale) if self.scaler else 1.0
        self.trained.unscale_gradients(held, 1 / scale)

    def _params_of(self, optimizers: Sequence[Optimizer]) -> list[nn.Parameter]:
        """Return the trained parameters that optimizers hold, after the masters have replaced their weights."""
        for optimizer in optimizers:
            if self._adopted.get(optimizer) != len(held_by([optimizer])):
                self.adopt(optimizer)
        held = self.trained.check(optimizers)
        self.trained.follow_weights()
        return held

    def step(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        max_norm: float | None = None,
        buffers: Sequence[Tensor] = (),
    ) -> StepResult:
        """Unscale, clip, check and apply the gradients of one accumulation window, then clear them.

        If gradients, a loss or buffers are not finite on any rank, no rank applies the update. A loss of NaN may have
        gradients of zero, with which Adam's running means would still move the weights.

        Args:
            optimizer: the optimizer to step; several are stepped together or not at all.
            max_norm: clip the global L2 norm of the gradients to this; None or 0 turns clipping off.
            buffers: float buffers that the window's forward passes have changed; they must be finite too.

        Raises:
            UserError: see `adopt` and `Window.check`; raised on all ranks if on one.
            TrainingError: on some rank no weight has a gradient, a weight has none under DDP without
                `find_unused_parameters`, or the mode does not work and no fallback is left.
            InterruptedUpdate: the optimizer failed during the update.
        """
        if self.window.dropped:
            return StepResult(False, math.nan, self.window.dropped)
        optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        self.check_block_runs()
        held, found, misuse = self._measure(optimizers, buffers)
        objection = self.observer.judge(found) if self.observer and found.finite else None
        flags = [not math.isfinite(value) for value in (found.norm, found.loss, found.buffers)]
        troubles = [found.refusal is not None, found.norm < 0, misuse is not None]
        # The only agreement of a step: all ranks take the same decision.
        agreed = self.world.any([*flags, objection is not None, *troubles])
        nonfinite, bad_loss, bad_buffers, objected, refused, unconnected, misused = agreed
        if refused or unconnected or misused:
            self.zero_grad(*optimizers)
        if misused:
            raise misuse or UserError("another rank's step was refused; see its message")
        if unconnected:
            raise TrainingError(UNCONNECTED)
        if refused:
            reason = f"unscaling failed: {found.refusal or 'on another rank'}"
            return self._fall_back(reason, StepResult(False, found.norm))
        for what, bad in (("loss", bad_loss), ("norm", nonfinite), ("buffers", bad_buffers)):
            if bad:
                return self._skip(optimizers, found, what, buffers, nonfinite)
        because, scale = (objection or ELSEWHERE) if objected else None, self.window.scale
        result = StepResult(not objected, found.norm, because, None, found.loss, scale, bool(objected))
        self._seen(result, found)
        if objected:
            self._close(optimizers, finite=None)
        else:
            self._apply(optimizers, held, found, max_norm)
            self.skips_in_a_row = self.bad_losses_in_a_row = 0
        return result

    def _measure(
        self, optimizers: list[Optimizer], buffers: Sequence[Tensor]
    ) -> tuple[list[nn.Parameter], Measured, UserError | None]:
        """Return the parameters and what was measured of them, or this rank's error: the ranks agree before a raise."""
        held: list[nn.Parameter] = []
        try:
            held = self._params_of(optimizers)
            if any(id(one) in self.window.unscaled for one in optimizers):
                for one in optimizers:
                    self.unscale(one)
            every_gradient = any(not ddp.find_unused_parameters for ddp in self._ddp_modules())
            return held, measure(optimizers, held, self.window, self.scaler, every_gradient, buffers), None
        except UserError as error:
            return held, Measured(0.0), error

    def _seen(self, result: StepResult, found: Measured, *, last: bool = False) -> None:
        if self.observer:
            self.observer.look(found, result, last=last)

    def _apply(
        self, optimizers: list[Optimizer], held: list[nn.Parameter], found: Measured, max_norm: float | None
    ) -> None:
        # Clipping and unscaling are one factor, multiplied in float32: FP16 would flush gradients to zero.
        factor = max_norm / found.norm if max_norm and found.norm > max_norm else 1.0
        factor /= found.scale

        def step() -> None:
            for optimizer in optimizers:
                optimizer.step()

        self.stepping = True
        try:
            self.trained.update(held, factor, step)
        except Exception as error:
            raise InterruptedUpdate(
                f"the optimizer failed in the middle of an update ({type(error).__name__}: {error}): weights and their "
                "running means may be half-updated and must not be used"
            ) from error
        finally:
            self.stepping = False
        self._close(optimizers, finite=True)

    def _close(self, optimizers: list[Optimizer], finite: bool | None) -> None:
        """Clear the gradients of optimizers, and update the loss scale unless `finite` is None.

        Other optimizers can be stepped until the next backward pass.
        """
        if self.scaler and finite is not None and (not finite or not self.window.closed):
            self.scaler.update(finite)
        elif self.scaler:
            self.scaler.clear()
        drop_scaler_marks(optimizers)
        held = held_by(optimizers)
        self.trained.clear_gradients(held)
        self.window.closed = True
        if len(held) >= len(self.trained.weights):
            self.window = Window(self.trained)
        self.window.record_versions(only_views=True)

    def _skip(
        self, optimizers: list[Optimizer], found: Measured, what: str, buffers: Sequence[Tensor], nonfinite: bool
    ) -> StepResult:
        """Drop the gradients of optimizers, because `what` is not finite on some rank."""
        self.skips_in_a_row += 1
        self.bad_losses_in_a_row = self.bad_losses_in_a_row + 1 if what == "loss" else 0
        value = getattr(found, what)
        place = "on another rank" if math.isfinite(value) else f"{what} {value}"
        reason = f"{NOT_FINITE[what]} that are not finite ({place})"
        losses_end = bool(self.chain.remaining) and self.bad_losses_in_a_row >= self.config.max_nonfinite_losses
        skips_end = self.skips_in_a_row >= self.config.max_skips
        result = StepResult(False, found.norm, reason, None, found.loss, self.window.scale)
        self._seen(result, found, last=losses_end or skips_end)
        self._close(optimizers, finite=False if nonfinite else None)

        def advice() -> str:
            assert self.model is not None
            return explain_nonfinite(self.model, what, buffers, fp16=self.mode.scaler is not None)

        if losses_end:
            reason = f"{self.bad_losses_in_a_row} losses in a row were not finite"
            return self._fall_back(reason, result, advice)
        if skips_end:
            return self._fall_back(f"{self.skips_in_a_row} steps in a row had {reason}", result, advice)
        return result

    def _fall_back(
        self,
        reason: str,
        result: StepResult,
        advice: Callable[[], str] = lambda: "Set another precision.mode, or more modes in precision.fallback",
    ) -> StepResult:
        """Switch to the next mode, at this step boundary.

        Raises:
            TrainingError: none is left; the message ends with the advice.
        """
        name = self.name
        if not self.advance(reason):
            raise TrainingError(
                f"{reason}, in precision.mode {self.chain.trail()}, and no mode is left: training cannot go on. "
                f"{advice()}"
            )
        self.window.dropped = f"the window was dropped: {self.reason}"
        return result._replace(skipped_because=reason, fell_back=f"{name} -> {self.name}")
