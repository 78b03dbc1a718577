"""Loss scaling: our own scaler for native FP16, and torch's GradScaler under guard.

FP16 gradients below 6e-8 are zero, so the loss is multiplied by a power of two before backward and the gradients are
divided by it in float32. Both scalers have a floor, which torch's lacks: after 144 skipped steps its scale is so small
that dividing by it overflows, and the first good step poisons the weights.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rawloop.errors import UserError


@dataclass
class LossScaleConfig:
    """Dynamic loss scaling, for FP16 modes only.

    Args:
        init: scale at the start. 2^15 is the largest that an FP16 loss can be multiplied by.
        floor: never below this; a step that is not finite at the floor is counted and skipped.
        ceiling: never above this.
        growth_interval: double the scale after this many good steps in a row.
        hysteresis: halve it only at every n-th step that is not finite.
    """

    init: float = 2.0**15
    floor: float = 1.0
    ceiling: float = 2.0**24
    growth_interval: int = 2000
    hysteresis: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.floor <= self.init <= self.ceiling:
            raise UserError(
                f"precision.loss_scale needs 0 < floor <= init <= ceiling: they are {self.floor:g}, {self.init:g} and "
                f"{self.ceiling:g}"
            )
        if self.growth_interval < 1 or self.hysteresis < 1:
            raise UserError(
                f"precision.loss_scale.growth_interval ({self.growth_interval}) and hysteresis ({self.hysteresis}) "
                "must be 1 or more"
            )


class LossScaler:
    """A loss scale as plain Python numbers: doubled after good steps, halved after bad ones, between two bounds."""

    def __init__(self, config: LossScaleConfig) -> None:
        self.config = config
        self.scale = config.init
        self.good_steps = 0
        self.bad_steps = 0

    def apply(self, loss: Tensor) -> Tensor:
        """Return the loss times the scale, in float32."""
        if loss.dtype == torch.float16:  # its gradient is the scale itself, in FP16: 2^16 would be infinite
            self.scale = min(self.scale, 2.0**15)
        return loss.float() * self.scale

    def update(self, finite: bool) -> None:
        """Move the scale after a step."""
        config = self.config
        if finite:
            self.good_steps += 1
            self.bad_steps = 0
            if self.good_steps >= config.growth_interval:
                self.scale, self.good_steps = min(self.scale * 2.0, config.ceiling), 0
            return
        self.good_steps = 0
        self.bad_steps += 1
        if self.bad_steps >= config.hysteresis:
            self.scale, self.bad_steps = max(self.scale / 2.0, config.floor), 0

    def state_dict(self) -> dict[str, Any]:
        """Return scale and counters."""
        return {"scale": self.scale, "good_steps": self.good_steps, "bad_steps": self.bad_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore scale and counters."""
        self.scale, self.good_steps, self.bad_steps = state["scale"], state["good_steps"], state["bad_steps"]


class GuardedGradScaler:
    """torch's GradScaler with a floor and a ceiling, driven so that its state machine cannot be left half-way.

    It unscales in place (trainables are float32, so nothing flushes to zero), and whether a step is applied is decided
    outside, by all ranks. `theirs` may be a user's own scaler.
    """

    def __init__(self, config: LossScaleConfig, device: torch.device, theirs: Any = None) -> None:
        self.config = config
        self.grad_scaler: Any = theirs or torch.amp.GradScaler(
            device.type, init_scale=config.init, growth_interval=config.growth_interval
        )

    def apply(self, loss: Tensor) -> Tensor:
        """Return the scaled loss."""
        scaled: Tensor = self.grad_scaler.scale(loss.float())
        return scaled

    def update(self, finite: bool) -> None:
        """Move the scale after a step, and clear what the scaler remembers of it, applied or not."""
        if finite:
            self.grad_scaler.update()
            if self.grad_scaler.get_scale() > self.config.ceiling:
                self.grad_scaler.update(self.config.ceiling)
        else:
            lowered = self.grad_scaler.get_scale() * self.grad_scaler.get_backoff_factor()
            self.grad_scaler.update(max(lowered, self.config.floor))

    def state_dict(self) -> dict[str, Any]:
        """Return the scaler's own state."""
        state: dict[str, Any] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the scaler's own state."""
        self.grad_scaler.load_state_dict(state)
