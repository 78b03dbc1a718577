"""Loss scaling: rawloop's scaler for native FP16, and a guard around torch's GradScaler.

FP16 gradients below 6e-8 are zero, so the loss is multiplied by a power of two before backward, and the gradients are
divided by it in float32. Both scalers have a floor. torch's own has none: after 144 skipped steps its scale is so small
that dividing by it overflows, and the next good step corrupts the weights.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rawloop.errors import UserError
from rawloop.precision.config import LossScaleConfig

FP16_LOSS_CEILING = 2.0**15


class LossScaler:
    """A loss scale between two bounds, in Python numbers: doubled after good steps, halved after bad ones."""

    def __init__(self, config: LossScaleConfig) -> None:
        self.config = config
        self.scale, self.ceiling = config.init, config.ceiling
        self.growth, self.backoff, self.growth_interval = 2.0, 0.5, config.growth_interval
        self.good_steps = 0
        self.bad_steps = 0
        self.window_open = False  # a micro-batch was scaled: the scale is fixed until the step

    def apply(self, loss: Tensor) -> Tensor:
        """Return the loss times the scale, in float32."""
        self._open_window(loss)
        return loss.float() * self.scale

    def unscale(self, optimizers: Sequence[Optimizer], scale: float) -> float:
        """Return the scale that is left on the gradients: all of it. The update divides by it in float32."""
        return scale

    def _open_window(self, loss: Tensor) -> None:
        if loss.dtype == torch.float16:  # its gradient is the scale in FP16, where 2^16 is infinite
            self.ceiling = min(self.ceiling, FP16_LOSS_CEILING)
            if not self.window_open:
                self._set(min(self.scale, self.ceiling))
        self.window_open = True

    def _set(self, scale: float) -> None:
        self.scale = scale

    def update(self, finite: bool) -> None:
        """Update the scale after a step."""
        self.window_open = False
        if finite:
            self.good_steps += 1
            self.bad_steps = 0
            if self.good_steps >= self.growth_interval:
                self.scale, self.good_steps = min(self.scale * self.growth, self.ceiling), 0
        else:
            self.good_steps = 0
            self.bad_steps += 1
            if self.bad_steps >= self.config.hysteresis:
                self.scale, self.bad_steps = max(self.scale * self.backoff, self.config.floor), 0
        self._set(min(self.scale, self.ceiling))

    def clear(self) -> None:
        """Drop the current window without changing the scale."""
        self.window_open = False

    def state_dict(self) -> dict[str, Any]:
        """Return the scale and the counters."""
        return {"scale": self.scale, "good_steps": self.good_steps, "bad_steps": self.bad_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the scale and the counters."""
        self.good_steps, self.bad_steps = state["good_steps"], state["bad_steps"]
        self._set(state["scale"])


class GuardedGradScaler(LossScaler):
    """Drives torch's GradScaler by the numbers of `LossScaler`, which are written into it after every step.

    So the scale has a floor, all ranks use the same rule, and nothing is read from the device. The torch scaler
    multiplies the loss, and divides the gradients in place: they are float32, so none becomes zero. It does not see the
    optimizer's step, so a failed step cannot leave `grad_scale` or `found_inf` on a fused optimizer.

    Args:
        config: the bounds, and the rule for a new scaler.
        device: where the model runs.
        theirs: the user's own scaler, if any; its scale, factors and interval are kept.

    Raises:
        UserError: the user's scaler is disabled, so most FP16 gradients would be zero, or its scale is out of bounds.
    """

    def __init__(self, config: LossScaleConfig, device: torch.device, theirs: Any = None) -> None:
        super().__init__(config)
        self.torch_scaler: Any = theirs if theirs is not None else torch.amp.GradScaler(device.type)
        if not self.torch_scaler.is_enabled():
            raise UserError(
                f"the GradScaler for '{device.type}' is disabled and would scale nothing: build it for the device that "
                "the model runs on, with enabled=True"
            )
        if theirs is not None:
            state = theirs.state_dict()
            self.scale, self.good_steps = state["scale"], state["_growth_tracker"]
            self.growth, self.backoff = state["growth_factor"], state["backoff_factor"]
            self.growth_interval = state["growth_interval"]
            if not config.floor <= self.scale <= config.ceiling:
                raise UserError(
                    f"the GradScaler's scale is {self.scale:g}, outside precision.loss_scale.floor ({config.floor:g}) "
                    f"and ceiling ({config.ceiling:g}): build it with another init_scale, or widen the bounds"
                )
        self._used = False  # before its first `scale`, torch's scaler cannot be updated
        self._set(self.scale)

    def apply(self, loss: Tensor) -> Tensor:
        """Return the scaled loss, in float32."""
        self._open_window(loss)
        self._used = True
        scaled: Tensor = self.torch_scaler.scale(loss.float())
        return scaled

    def unscale(self, optimizers: Sequence[Optimizer], scale: float) -> float:
        """Divide the gradients of optimizers by the scale of their window, in place, and return 1: no scale is left.

        Raises:
            ValueError, RuntimeError, AssertionError: torch's scaler refuses, for example FP16 gradients.
        """
        for optimizer in optimizers:
            self.torch_scaler.unscale_(optimizer)
            if scale != self.scale:  # the step of another optimizer has changed it since
                gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
                torch._foreach_mul_(gradients, self.scale / scale)
        return 1.0

    def _set(self, scale: float) -> None:
        self.scale = scale
        self.torch_scaler.load_state_dict(
            {
                "scale": scale,
                "growth_factor": self.growth,
                "backoff_factor": self.backoff,
                "growth_interval": self.growth_interval,
                "_growth_tracker": self.good_steps,
            }
        )
        if self._used:
            self.torch_scaler.update(scale)  # resets which optimizers were unscaled

    def clear(self) -> None:
        """Drop the current window, unscaled or not, without changing the scale."""
        super().clear()
        self._set(self.scale)
