"""The precision policy: which dtype weights have, what runs under autocast, and when an update is applied.

Modes are rows of a table, so the loop, the evaluator and a foreign loop call the same verbs whatever the mode is:
`prepare`, `autocast`, `backward`, `step`. `prepare` runs before DDP and the optimizer exist. A mode that turns out not
to work is left for the next one of `precision.fallback`, by all ranks at the same step boundary.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple
from warnings import warn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rawloop.errors import InterruptedUpdate, TrainingError, UserError
from rawloop.precision.casting import cast, cast_frozen, check_trainable
from rawloop.precision.choice import Choice, refusal
from rawloop.precision.gradients import Measured, connected, found_out, measure
from rawloop.precision.masters import HALF, Trained
from rawloop.precision.modes import MODES, Mode, PrecisionConfig, describe, examine
from rawloop.precision.optimizers import adopt, check_casts, clear, exchange, held_by, lost_updates, trained_by
from rawloop.precision.scaler import GuardedGradScaler, LossScaler

BAD = {"loss": "losses", "norm": "gradients", "buffers": "moving buffers"}
UNPREPARED = "the precision policy has no model yet: call policy.prepare(model) first"


class StepResult(NamedTuple):
    """What one optimizer step did. `grad_norm` is the global L2 norm before clipping.

    `fell_back` says `amp_fp16 -> bf16` if the step was the last one of its mode. A DDP wrapper must then be built anew:
    weights may have changed their dtype.
    """

    applied: bool
    grad_norm: float
    skipped_because: str | None = None
    fell_back: str | None = None


def one_rank(flags: Sequence[bool]) -> Sequence[bool]:
    """The agreement of a single process."""
    return flags


class PrecisionPolicy:
    """Applies one row of `MODES` to a model, in rawloop's loop or in your own.

    Args:
        config: the wanted mode.
        device: where the model runs.
        agree: tells of each of some flags whether it is true on any rank; the default is right for a single process.
            All ranks must take the same decision at each step.
        grad_scaler: your own torch GradScaler, for amp_fp16.
        resume: what `state_dict` returned, of a run that will go on: in the mode that it had fallen back to, if it
            had. Call `load_state_dict` with it as well, when weights and optimizer are loaded.
        say: is given what the user should know, a sentence at a time.

    Raises:
        UserError: the device does not compute the wanted mode, or the settings contradict each other.
    """

    def __init__(
        self,
        config: PrecisionConfig,
        device: torch.device,
        agree: Callable[[Sequence[bool]], Sequence[bool]] = one_rank,
        grad_scaler: Any = None,
        resume: Mapping[str, Any] | None = None,
        say: Callable[[str], None] = warn,
    ) -> None:
        self.config, self.device, self.agree, self.say = config, device, agree, say
        self.choice = Choice(config, describe(device), resume)
        self.model: nn.Module | None = None
        self.trained = Trained([], torch.float32, device)
        self.scaler: LossScaler | None = None
        self.skips_in_a_row = self.bad_losses_in_a_row = 0
        self._theirs = grad_scaler
        self._loss: Tensor | None = None  # the sum of the window's losses, not finite if one of them is not
        self.every_gradient = False  # whether a trained weight without a gradient is an error, as it is under plain DDP
        self._adopted: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
        if grad_scaler is not None and "amp_fp16" not in (self.name, *self.choice.left):
            raise UserError(f"a GradScaler was handed in and precision.mode is '{self.name}': it goes with amp_fp16")

    @property
    def name(self) -> str:
        """The name of the mode; `auto` until the model is prepared."""
        return self.choice.name

    @property
    def reason(self) -> str:
        """Why it is this mode."""
        return self.choice.reason

    @property
    def mode(self) -> Mode:
        """The row of the table.

        Raises:
            UserError: it is `auto`, and what that is depends on a model.
        """
        if self.name not in MODES:
            raise UserError(UNPREPARED)
        return MODES[self.name]

    def prepare(self, model: nn.Module) -> nn.Module:
        """Cast the model's weights as the mode asks, in place, before DDP and the optimizer exist.

        Raises:
            UserError: nothing is trainable, a trainable weight is of a dtype that is never right, or the mode cannot
                train these weights.
        """
        if self.model is not None:
            raise UserError("prepare was called twice: put several models into one torch.nn.ModuleList")
        if self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = self.config.tf32
            torch.backends.cudnn.allow_tf32 = self.config.tf32
        check_trainable(model)
        self.choice.settle(examine(model))
        self.model = model
        for step in self.choice.history:  # rounded by a mode that was left, frozen weights stay rounded after a resume
            if step["entered"]:
                cast_frozen(model, step["from"], self.config)
        self._enter()
        return model.to(self.device)

    def _enter(self) -> None:
        """Cast the model for the mode that `name` says, and make what the mode needs."""
        assert self.model is not None
        while True:
            try:
                self.trained = cast(self.model, self.name, self.config, self.device)
                break
            except UserError as error:  # raised before any weight is changed
                if not self.choice.advance(str(error)):
                    raise
        loss_scale = self.config.loss_scale
        self.scaler = None
        if self.mode.scaler == "own":
            self.scaler = LossScaler(loss_scale)
        elif self.mode.scaler == "torch":
            self.scaler = GuardedGradScaler(loss_scale, self.device, self._theirs)

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """What the optimizer must hold after `prepare`: the trainable weights, or what stands for them, by name."""
        return self.trained.named_parameters()

    def adopt(self, *optimizers: Optimizer) -> None:
        """Let optimizers that were built over the model's own weights hold what stands for them: float32 masters.

        `step` does it by itself. Call it yourself before you load an optimizer's state: torch casts a state to the
        dtype of the weights that it finds, and in 16 bits most of it is zero.

        Raises:
            UserError: an optimizer holds weights that the model does not train, a weight was cast after `prepare`, or
                a state has been loaded in 16 bits.
        """
        if self.model is None:
            raise UserError(UNPREPARED)
        if self.trained.written():  # DDP's first broadcast, or a state loaded after `prepare`
            self.trained.follow_weights()
        for optimizer in optimizers:
            adopt(optimizer, self.trained, self.model.parameters())
            self._adopted[optimizer] = len(held_by([optimizer]))
            if self.trained.dtype in HALF and not self.trained.stand_ins:
                self.say(lost_updates(self.trained, max(float(group["lr"]) for group in optimizer.param_groups)))

    def autocast(self) -> AbstractContextManager[Any]:
        """Context for every forward pass: training, evaluation and generation alike."""
        dtype = self.mode.autocast
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass, on the scaled loss where the mode scales.

        Raises:
            UserError: it is no tensor of one number.
            TrainingError: the loss hangs on no trainable weight, so nothing would be learnt from it.
        """
        value = connected(loss).detach().float().reshape(())
        self._loss = value if self._loss is None else self._loss + value
        torch.autograd.backward(self.scaler.apply(loss) if self.scaler else loss.float())

    def zero_grad(self, *optimizers: Optimizer) -> None:
        """Drop the window that was begun: gradients where backward has put them, the scaler's note, the losses' sum.

        `optimizer.zero_grad()` alone does not see the gradients of weights that have masters.
        """
        self._loss = None
        if self.scaler:
            self.scaler.clear()
        clear(optimizers)
        self.trained.clear_gradients()

    def step(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        max_norm: float | None = None,
        buffers: Sequence[Tensor] = (),
    ) -> StepResult:
        """Unscale, clip, test and apply the gradients of one accumulation window, then clear them.

        Args:
            optimizer: whose parameters' gradients are applied; several are applied together or not at all.
            max_norm: clip the global L2 norm of the gradients to this; None or 0 clips nothing.
            buffers: floats that the window's forward passes have moved, and that must be finite as well.

        Returns:
            whether the update was applied. Where gradients, a loss or buffers are not finite on any rank, it is on
            none: a loss of NaN may well have gradients of zero, with which running means would move the weights.

        Raises:
            UserError: see `adopt`; or gradients were not made by `backward`. On all ranks, if on one.
            TrainingError: some rank's weights have no gradient at all, or the mode has to be given up and no other is
                left in `precision.fallback`.
            InterruptedUpdate: the optimizer failed in the middle of the update.
        """
        optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        held: list[nn.Parameter] = []
        found, misuse = Measured(0.0), None
        try:
            held = self._held(optimizers)
            loss, self._loss = self._loss, None
            found = measure(optimizers, held, self.trained, self.scaler, loss, self.every_gradient, buffers)
        except UserError as error:
            misuse = error
        norm, refusal = found.norm, found.refusal
        flags = [not math.isfinite(value) for value in (norm, found.loss, found.buffers)]
        # The one agreement: every rank decides alike.
        nonfinite, bad_loss, bad_buffers, refused, unconnected, misused = self.agree(
            [*flags, refusal is not None, norm < 0, misuse is not None]
        )
        if refused or unconnected or misused:
            self.zero_grad(*optimizers)
        if misused:
            raise misuse or UserError("another rank's step was refused, for a reason that it gives")
        if unconnected:
            raise TrainingError(
                "on one rank at least, no weight of the optimizer got a gradient: what the loss hangs on is frozen, of "
                "another model, or made anew with requires_grad=True"
            )
        if refused:
            return self._give_up(optimizers, f"unscaling failed: {refusal or 'on another rank'}", norm)
        if nonfinite and self.scaler:
            self.scaler.update(False)
        for what, bad in (("loss", bad_loss), ("norm", nonfinite), ("buffers", bad_buffers)):
            if bad:
                return self._skip(optimizers, found, what, buffers)
        self._apply(optimizers, held, norm, max_norm)
        self.skips_in_a_row = self.bad_losses_in_a_row = 0
        return StepResult(True, norm)

    def _held(self, optimizers: list[Optimizer]) -> list[nn.Parameter]:
        for optimizer in optimizers:
            if self._adopted.get(optimizer) != len(held_by([optimizer])):
                self.adopt(optimizer)
        check_casts(self.trained)
        if self.trained.written():
            self.trained.follow_weights()
        return trained_by(optimizers, self.trained)

    def _apply(
        self, optimizers: list[Optimizer], held: list[nn.Parameter], norm: float, max_norm: float | None
    ) -> None:
        # Clipping and unscaling are one factor, multiplied in float32: in FP16 it would flush gradients to zero.
        factor = max_norm / norm if max_norm and norm > max_norm else 1.0
        if self.scaler and not isinstance(self.scaler, GuardedGradScaler):
            factor /= self.scaler.scale

        def step() -> None:
            for optimizer in optimizers:
                optimizer.step()

        try:
            self.trained.update(held, factor, step)
        except Exception as error:
            raise InterruptedUpdate(
                f"the optimizer failed in the middle of an update ({type(error).__name__}: {error}): weights and their "
                "running means may be half-updated and must not be used"
            ) from error
        if self.scaler:
            self.scaler.update(True)
        clear(optimizers)
        self.trained.clear_gradients()

    def _skip(self, optimizers: list[Optimizer], found: Measured, what: str, buffers: Sequence[Tensor]) -> StepResult:
        """Drop a window; `what` of it is not finite, on some rank."""
        self.zero_grad(*optimizers)
        self.skips_in_a_row += 1
        self.bad_losses_in_a_row = self.bad_losses_in_a_row + 1 if what == "loss" else 0
        value = getattr(found, what)
        place = "on another rank" if math.isfinite(value) else f"{what} {value}"
        reason = f"{BAD[what]} that are not finite ({place})"

        def advice() -> str:
            assert self.model is not None
            return found_out(self.model, what, buffers, fp16=self.mode.scaler is not None)

        if self.choice.left and self.bad_losses_in_a_row >= self.config.max_nonfinite_losses:
            reason = f"{self.bad_losses_in_a_row} losses in a row were not finite"
            return self._give_up(optimizers, reason, found.norm, advice)
        if self.skips_in_a_row >= self.config.max_skips:
            reason = f"{self.skips_in_a_row} steps in a row had {reason}"
            return self._give_up(optimizers, reason, found.norm, advice)
        return StepResult(False, found.norm, reason)

    def _give_up(
        self,
        optimizers: list[Optimizer],
        reason: str,
        norm: float,
        advice: Callable[[], str] = lambda: "Name another precision.mode, or more modes in precision.fallback",
    ) -> StepResult:
        """Leave the mode for the next of the chain, at this step boundary.

        Raises:
            TrainingError: there is none; ends with the advice.
        """
        name = self.name
        if not self.advance(reason):
            raise TrainingError(
                f"{reason}, in precision.mode {self.choice.trail()}, and no mode is left: training cannot go on. "
                f"{advice()}"
            )
        clear(optimizers)
        return StepResult(False, norm, reason, fell_back=f"{name} -> {self.name}")

    def advance(self, reason: str) -> bool:
        """Leave the mode for the next one of the chain; False, and nothing changed, if none is left.

        Weights, masters and scaler become those of the new mode, and optimizers that the policy knows hold what stands
        for them, with their running means. DDP must be built anew.
        """
        before = dict(self.named_parameters())
        if not self.choice.advance(reason, entered=True):
            return False
        self.trained.restore_float32()
        self.skips_in_a_row = self.bad_losses_in_a_row = 0
        self._enter()
        after = dict(self.named_parameters())
        for optimizer in self._adopted:
            exchange(optimizer, {id(held): after[name] for name, held in before.items()})
            clear([optimizer])
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the mode, why it is that one, the counts of skips, the scaler, and masters or residuals."""
        return {
            "mode": self.name,
            "reason": self.reason,
            "history": list(self.choice.history),
            "skips_in_a_row": self.skips_in_a_row,
            "bad_losses_in_a_row": self.bad_losses_in_a_row,
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "masters": self.trained.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, after the model's weights.

        Raises:
            UserError: the state is of another mode.
            CheckpointError: its masters are of other weights.
        """
        if state["mode"] != self.name:
            raise UserError(refusal(state["mode"], self.name))
        self.choice.history = list(state["history"])
        self.skips_in_a_row, self.bad_losses_in_a_row = state["skips_in_a_row"], state["bad_losses_in_a_row"]
        self.trained.load_state_dict(state["masters"])
        if self.scaler:
            self.scaler.load_state_dict(state["scaler"])
